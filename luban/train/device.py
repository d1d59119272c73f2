"""Where training runs: device, determinism, whether it can compile, free memory."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from luban.core.errors import UnsupportedError
from luban.core.log import warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(wanted: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises UnsupportedError for a CUDA device that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("train.device is cuda, but torch sees no CUDA device here: use --train.device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def set_determinism(wanted: bool | None, device: torch.device) -> bool:
    """Make torch bitwise repeatable, or not; None means yes on the CPU and no on CUDA. Returns the choice."""
    chosen = device.type == "cpu" if wanted is None else wanted
    if chosen and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(chosen)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and finds only bugs
    return chosen


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs here; warns once with what is missing."""
    if device.type == "cuda":
        return True
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        warn("training runs uncompiled: torch.compile needs a C++ compiler (g++), and there is none")
        return False
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        warn("training runs uncompiled: torch.compile needs Python's headers (python3-dev), and they are missing")
        return False
    return True


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep large blocks that are freed, so that every step reuses the pages of the last.

    glibc gives blocks above 32 MB back to the system and gets them again zeroed, page by page: on a virtual
    machine this made writing 4096 × 4096 logits four times as slow. Other C libraries are left as they are.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on the CPU within the container's limit, on CUDA on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _available_ram()
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()) + _reclaimable())
    return free


def resident_memory() -> int:
    """Bytes of main memory that this process holds."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # elsewhere the most so far: bytes on macOS
    return peak if sys.platform == "darwin" else 1024 * peak


def _available_ram() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reclaimable() -> int:
    """The page cache that the container would give back."""
    stat = Path("/sys/fs/cgroup/memory.stat")
    if not stat.is_file():
        return 0
    rows = dict(line.split() for line in stat.read_text().splitlines() if len(line.split()) == 2)
    return int(rows.get("inactive_file", 0))

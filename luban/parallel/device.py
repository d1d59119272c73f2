"""Where training runs: device, determinism, whether it can compile."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from luban.core.errors import UnsupportedError
from luban.core.log import warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def choose_device(wanted: str) -> torch.device:
    """ "auto" is CUDA where there is one. Each process of a run takes the CUDA device of its LOCAL_RANK.

    Raises UnsupportedError for a CUDA device that is not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("train.device is cuda, but torch sees no CUDA device here: use --train.device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    index, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= devices:
        raise UnsupportedError(
            f"process {index + 1} of this machine has no GPU: there are {devices}, so start at most {devices} processes, "
            f"or use --train.device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for matmuls in bf16. An x86 processor without them converts, which takes about three
    times as long as float32."""
    if device.type != "cpu":
        return True
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return found.get("architecture") != "x86_64" or bool(found["avx512_bf16"] or found["amx_bf16"])


def timed(work: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each of some runs after one to warm up, waiting for the device."""
    times = []
    for _ in range(1 + rounds):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return times[1:]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_determinism(wanted: bool | None, device: torch.device) -> bool:
    """Make torch bitwise repeatable, or not; None means yes on the CPU and no on CUDA. Returns the choice."""
    chosen = device.type == "cpu" if wanted is None else wanted
    if chosen and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(chosen)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and finds only bugs
    return chosen


def can_compile(device: torch.device) -> bool:
    """True if torch.compile can run here; otherwise warns with what is missing."""
    missing = compiler_missing(device)
    if missing:
        warn(f"training runs uncompiled: torch.compile needs {missing}")
    return missing is None


def compiler_missing(device: torch.device) -> str | None:
    """The missing requirement of torch.compile; None if nothing is missing."""
    if device.type == "cuda":
        return None
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return "a C++ compiler (g++), and there is none"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's headers (python3-dev), and they are missing"
    return None


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

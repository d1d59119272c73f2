"""How much memory there is to train or serve in: what the device has free, within every limit set on this process."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

UNLIMITED = 2**60  # control groups of version 1 write a number near 2⁶³ where there is no limit


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on CUDA on the device, on the CPU within the limits of control groups (of
    containers, services, batch jobs) and of `ulimit`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([_available(), *_groups(Path("/")), *_ulimits()]))


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on the device or on the CPU, for which torch has no error class."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def resident_memory() -> int:
    """Bytes of main memory that this process holds."""
    pages = _pages()
    if pages:
        return pages[1]
    return peak_memory()  # elsewhere the most so far


def peak_memory() -> int:
    """The most bytes of main memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, on macOS bytes
    return peak if sys.platform == "darwin" else 1024 * peak


def _available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path) -> Iterator[int]:
    """Memory left in each control group of this process; a group's limit also applies to the groups below it.

    Args:
        root: of the file system.
    """
    member = root / "proc/self/cgroup"
    for line in member.read_text().splitlines() if member.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limits, used, cache = root / "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", ""
        elif "memory" in controllers.split(","):
            base, limits = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes",)
            used, cache = "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            for name in limits:
                limit = _number(group / name)
                if limit is not None and limit < UNLIMITED:
                    yield limit - (_number(group / used) or 0) + _reclaimable(group, f"{cache}inactive_file")
            if group == base:  # inside a container the path may be the host's: then only this one is there
                break


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None  # "max": no limit


def _reclaimable(group: Path, name: str) -> int:
    """The page cache that the group would give back."""
    file = group / "memory.stat"
    rows = (
        dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line) if file.is_file() else {}
    )
    return int(rows.get(name, 0))


def _ulimits() -> Iterator[int]:
    """Memory left under `ulimit -v` and `ulimit -d`."""
    pages = _pages()
    for kind, used in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(kind)[0]
        if pages and limit != resource.RLIM_INFINITY:
            yield limit - pages[used]


def _pages() -> list[int]:
    """Bytes of this process: virtual, resident, shared, code, 0, data, 0; empty where the system doesn't tell."""
    file = Path("/proc/self/statm")
    size = os.sysconf("SC_PAGE_SIZE")
    return [int(field) * size for field in file.read_text().split()] if file.is_file() else []

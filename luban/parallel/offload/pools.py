"""Where offloaded tensors live: host memory, or one file of a disk.

The file's space is taken before anything is written, so that a full disk is met before the first step; its name is removed at once, so
that nothing is left behind however the run ends. Tensors are views of it, mapped into memory, for whatever looks at one now and then
(checkpoints); updates read and write it past the operating system's cache (`direct.py`), which keeps both in step.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.core.log import warn
from luban.core.plan import ParallelPlan
from luban.core.units import bytes_
from luban.parallel.offload.direct import ALIGNED, Buffer, DirectFile, done, rounded_up

SLAB = 2**30  # bytes of host memory taken at once
PROBE = 2**26  # bytes written and read to time a disk


class Pool(Protocol):
    """Makes tensors that stay in one place."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        ...


class HostPool:
    """Host memory, pinned where a GPU copies from it. Tensors share slabs, since torch rounds pinned ones up to powers of two.

    Args:
        size: bytes that all tensors take together, to choose the slabs by.
    """

    def __init__(self, pinned: bool, size: int):
        self.pinned = pinned
        self.slab_bytes = min(SLAB, 1 << max(size - 1, 1).bit_length())
        self.slab, self.used = torch.empty(0, dtype=torch.uint8), 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        count = prod(shape)
        size = rounded_up(count * dtype.itemsize)
        if size > self.slab_bytes:
            return torch.zeros(tuple(shape), dtype=dtype, pin_memory=self.pinned)
        if self.used + size > len(self.slab):
            self.slab, self.used = torch.zeros(self.slab_bytes, dtype=torch.uint8, pin_memory=self.pinned), 0
        found = self.slab[self.used : self.used + count * dtype.itemsize].view(dtype).view(tuple(shape))
        self.used += size
        return found


class DiskPool:
    """A file of `size` bytes in a folder.

    Raises:
        UnsupportedError: the folder has no space for it, or can't be written.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.used = folder, max(size, ALIGNED), 0
        self.offsets: dict[int, int] = {}  # address of a tensor → its place in the file
        handle = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix="luban-offload-")
            os.unlink(name)
            os.posix_fallocate(handle, 0, self.size)
            self._map = mmap.mmap(handle, self.size)
            self.direct = _direct(folder, handle)
        except OSError as error:
            raise _refused(folder, error, f"offloading to it needs {bytes_(self.size)}") from None
        finally:
            if handle >= 0:
                os.close(handle)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor; the file's space is zeros at first."""
        count = prod(shape)
        found = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self.used) if count else torch.empty(0)
        self.offsets[found.data_ptr()] = self.used
        self.used += rounded_up(count * dtype.itemsize)
        return found.to(dtype).view(tuple(shape))

    @staticmethod
    def bytes_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """What tensors of these shapes take."""
        return sum(rounded_up(prod(shape) * dtype.itemsize) for shape in shapes)


@dataclass(frozen=True)
class Places:
    """Where a process keeps what is offloaded."""

    state: Pool  # fp32 weights and Adam's moments
    sums: Pool | None  # of gradients; None: host memory as it comes
    weights: DiskPool | None  # of layers, in the dtype of the matmuls; None: host memory


def places(plan: ParallelPlan, device: torch.device, masters: Sequence[Tensor], weights: Sequence[Tensor]) -> Places:
    """Pools for a process's masters, their moments and sums of gradients, and for weights of layers as the plan has them; what goes
    to a disk shares one file.

    Raises:
        UnsupportedError: the disk has no space for it.
    """
    once, state = _pages(masters), 3 * _pages(masters)
    on_disk = state if plan.offload == "disk" else 0
    on_disk += once * (2 if plan.offload_delay else 1) if plan.offload_gradients == "disk" else 0
    on_disk += _pages(weights) if plan.offload_weights == "disk" else 0
    file = DiskPool(Path(plan.offload_folder), on_disk) if on_disk else None
    host = file if plan.offload == "disk" else HostPool(device.type == "cuda", state)
    assert host is not None
    return Places(
        state=host,
        sums=file if plan.offload_gradients == "disk" else None,
        weights=file if plan.offload_weights == "disk" else None,
    )


def _pages(tensors: Sequence[Tensor]) -> int:
    """Bytes that tensors take in a pool."""
    return sum(rounded_up(tensor.numel() * tensor.itemsize) for tensor in tensors)


def _direct(folder: Path, handle: int) -> DirectFile | None:
    """The open file for direct I/O; None, with a warning, where the file system refuses that."""
    try:
        return DirectFile(handle)
    except OSError as error:
        warn(
            f"the file system of plan.offload_folder {folder} refuses direct I/O ({error.strerror}): updates go through the "
            "operating system's cache, which is slower"
        )
        return None


def _refused(folder: Path, error: OSError, needed: str) -> UnsupportedError:
    """What a folder's disk lacks."""
    free = os.statvfs(folder) if folder.is_dir() else None
    left = "" if free is None else f", and {bytes_(free.f_bavail * free.f_frsize)} are free"
    what = "has no space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"can't be used ({error.strerror})"
    return UnsupportedError(f"plan.offload_folder {folder} {what}: {needed}{left}")


def disk_bandwidth(folder: Path, size: int = PROBE) -> float:
    """Bytes a second that an update reads and writes in a file of the folder: half of them each, past the cache where the file
    system allows that; `size` bytes, a multiple of two pages, are written and moved.

    Raises:
        UnsupportedError: the folder has no space for them, or can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _moved_bytes_a_second(folder, size)
    except OSError as error:
        raise _refused(folder, error, f"measuring its bandwidth takes {bytes_(size)}") from None


def _moved_bytes_a_second(folder: Path, size: int) -> float:
    half = size // 2
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        buffer = Buffer(size)
        buffer.bytes.random_()
        try:
            direct = DirectFile(file.fileno())
        except OSError:
            began = time.perf_counter()
            file.write(buffer.map)
            file.flush()
            os.fsync(file.fileno())
            return size / (time.perf_counter() - began)
        done(direct.write(buffer, 0, 0, size))  # the first write of a place takes longer
        began = time.perf_counter()
        done([*direct.write(buffer, 0, 0, half), *direct.read(buffer, half, half, half)])
        return size / (time.perf_counter() - began)

"""Where offloaded tensors live: host memory, or one file of a disk.

The file is mapped into memory, and its space is taken before anything is written, so that a full disk is met before the first step; its
name is removed at once, so that nothing is left behind however the run ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.core.units import bytes_

ALIGNED = 4096  # bytes: tensors begin at multiples, as pages of a file do
PROBE = 2**26  # bytes written and read to time a disk


class Pool(Protocol):
    """Makes tensors that stay in one place."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        ...


class HostPool:
    """Host memory, pinned where a GPU copies from it."""

    def __init__(self, pinned: bool):
        self.pinned = pinned

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=self.pinned)


class DiskPool:
    """A file of `size` bytes in a folder.

    Raises:
        UnsupportedError: the folder has no space for it, or can't be written.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.used = folder, max(size, ALIGNED), 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, prefix="luban-offload-")
            os.unlink(name)
            os.posix_fallocate(handle, 0, self.size)
        except OSError as error:
            free = os.statvfs(folder) if folder.is_dir() else None
            left = "" if free is None else f", and {bytes_(free.f_bavail * free.f_frsize)} are free"
            what = "has no space" if error.errno == errno.ENOSPC else f"can't be used ({error.strerror})"
            raise UnsupportedError(
                f"plan.offload_folder {folder} {what}: offloading to it needs {bytes_(self.size)}{left}"
            ) from None
        self._map = mmap.mmap(handle, self.size)
        os.close(handle)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A new tensor; the file's space is zeros at first."""
        count = prod(shape)
        found = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self.used) if count else torch.empty(0)
        self.used += -(-count * dtype.itemsize // ALIGNED) * ALIGNED
        return found.to(dtype).view(tuple(shape))

    @staticmethod
    def bytes_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> int:
        """What tensors of these shapes take."""
        return sum(-(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for shape in shapes)


def disk_bandwidth(folder: Path) -> float:
    """Bytes a second written to a file of the folder and reached by the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        file.write(os.urandom(2**20) * (PROBE // 2**20))
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - began)

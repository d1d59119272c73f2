"""Direct I/O: reads and writes of a file that go past the operating system's cache (O_DIRECT), several at once.

The cache would copy every byte once more and push other things out, for state that is read once a step. Memory, offsets and sizes are
multiples of a page.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

ALIGNED = 4096  # bytes: what tensors in a file begin at multiples of
REQUEST = 2**23  # bytes of one read or write; a disk serves several at once
THREADS = 8


def rounded_up(size: int) -> int:
    """Bytes as whole pages."""
    return -(-size // ALIGNED) * ALIGNED


class Buffer:
    """Page-aligned memory that a file is read into and written from."""

    def __init__(self, size: int):
        self.map = mmap.mmap(-1, max(rounded_up(size), ALIGNED))
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def tensor(self, place: int, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) numbers from the byte `place` on."""
        return self.bytes[place : place + count * dtype.itemsize].view(dtype)


Call = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


class DirectFile:
    """A file that is read and written past the cache.

    Args:
        handle: of an open file of at least a page, which may have no name.

    Raises:
        OSError: the operating or file system has no direct I/O.
    """

    def __init__(self, handle: int):
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self.handle = os.open(f"/proc/self/fd/{handle}", os.O_RDWR | flag)
        weakref.finalize(self, os.close, self.handle)
        with memoryview(Buffer(ALIGNED).map) as page:
            os.preadv(self.handle, [page], 0)  # some refuse only now
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="luban-disk")

    def read(self, buffer: Buffer, place: int, offset: int, size: int) -> list[Future[None]]:
        """Begin to read `size` bytes at `offset`, rounded up to pages, into a buffer from its byte `place` on."""
        return self._requests(os.preadv, buffer, place, offset, size)

    def write(self, buffer: Buffer, place: int, offset: int, size: int) -> list[Future[None]]:
        """Begin to write likewise."""
        return self._requests(os.pwritev, buffer, place, offset, size)

    def _requests(self, call: Call, buffer: Buffer, place: int, offset: int, size: int) -> list[Future[None]]:
        whole = rounded_up(size)
        return [
            self.pool.submit(self._moved, call, buffer, place + at, offset + at, min(REQUEST, whole - at))
            for at in range(0, whole, REQUEST)
        ]

    def _moved(self, call: Call, buffer: Buffer, place: int, offset: int, size: int) -> None:
        with memoryview(buffer.map) as view:
            while size:
                moved = call(self.handle, [view[place : place + size]], offset)
                if moved <= 0:
                    raise OSError(errno.EIO, f"{size} bytes at {offset} are missing from the file")
                place, offset, size = place + moved, offset + moved, size - moved


def done(requests: Sequence[Future[None]]) -> None:
    """Wait for all; raises the OSError of one that failed."""
    wait(requests)
    for request in requests:
        request.result()

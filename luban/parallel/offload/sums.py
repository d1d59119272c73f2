"""Gradients that leave the device while the backward pass goes on, and their sums on the host."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from luban.parallel.kept_sums import KeptSums
from luban.parallel.offload.pools import DiskPool, Pool
from luban.parallel.remat.host import Streams

IN_FLIGHT = 8  # gradients that may wait to be added to sums on a disk


class HostSums:
    """The step's sums, to which a thread adds gradients as soon as they are on the host.

    Args:
        streams: of the device that computes them.
        delayed: sums stay as they are while the next step's are made (`DelayedOptimizer`).
        pool: of the sums; None: host memory as it comes. Where that is a disk no memory is kept for gradients that arrive, and the
            backward pass waits for those that left first.
    """

    def __init__(self, streams: Streams, *, delayed: bool = False, pool: Pool | None = None):
        self.streams, self.lands = streams, not isinstance(pool, DiskPool)
        self._kept = KeptSums(1 + delayed, None if pool is None else pool.zeros)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="luban-gradients")
        self._adding: list[Future[None]] = []
        self._landings: dict[str, Tensor] = {}  # where gradients arrive

    def leave(self, name: str, gradient: Tensor) -> None:
        """Begin to copy a complete gradient to the host, and to add it there."""
        if self.streams.cuda and not gradient.is_cuda:  # of a matrix that is read by tiles
            self._adding.append(self._thread.submit(self._add, name, gradient, None))
            return
        while not self.lands and len(self._adding) >= IN_FLIGHT:
            self._adding.pop(0).result()
        with self.streams.copying("out"):
            host = self._landing(name, gradient).copy_(gradient, non_blocking=True)
            if self.streams.cuda:
                gradient.record_stream(torch.cuda.current_stream(self.streams.device))
            self._adding.append(self._thread.submit(self._add, name, host, self.streams.event()))

    def _landing(self, name: str, gradient: Tensor) -> Tensor:
        """Where a gradient arrives."""
        found = self._landings.get(name)
        if found is None:
            found = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=self.streams.cuda)
        if self.lands:
            self._landings[name] = found
        return found

    def _add(self, name: str, gradient: Tensor, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        self._kept.add({name: gradient})

    def wait(self) -> dict[str, Tensor]:
        """The sums of all that has left, by name."""
        adding, self._adding = self._adding, []
        for each in adding:
            each.result()
        return self._kept.sums

    def clear(self) -> None:
        """Forget the step's sums."""
        self.wait()
        self._kept.clear()

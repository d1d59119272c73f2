"""Gradients that leave the device while the backward pass goes on, and their sums on the host."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from luban.parallel.kept_sums import Empty, KeptSums
from luban.parallel.remat.host import Streams


class HostSums:
    """The step's sums, to which a thread adds gradients as soon as they are on the host.

    Args:
        streams: of the device that computes them.
        delayed: sums stay as they are while the next step's are made (`DelayedOptimizer`).
        empty: makes the memory of a sum; None: host memory.
    """

    def __init__(self, streams: Streams, *, delayed: bool = False, empty: Empty | None = None):
        self.streams = streams
        self._kept = KeptSums(1 + delayed, empty)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="luban-gradients")
        self._adding: list[Future[None]] = []
        self._landings: dict[str, Tensor] = {}  # where gradients arrive

    def leave(self, name: str, gradient: Tensor) -> None:
        """Begin to copy a complete gradient to the host, and to add it there."""
        if self.streams.cuda and not gradient.is_cuda:  # of a matrix that is read by tiles
            self._adding.append(self._thread.submit(self._add, name, gradient, None))
            return
        with self.streams.copying("out"):
            if name not in self._landings:
                self._landings[name] = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=self.streams.cuda)
            host = self._landings[name].copy_(gradient, non_blocking=True)
            if self.streams.cuda:
                gradient.record_stream(torch.cuda.current_stream(self.streams.device))
            self._adding.append(self._thread.submit(self._add, name, host, self.streams.event()))

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

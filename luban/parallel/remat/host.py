"""Tensors on their way to the host and back while a schedule of rematerialisation runs.

A tensor's storage is emptied once it is copied, and filled again before it is used, so that every view of it stays valid. On a GPU
copies run on two streams of their own through pinned memory; a CPU plays both sides, for tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from luban.planner.remat.pofo import Transfer

SMALLEST = 1024  # bytes of a storage that is worth a copy
PROBE = 2**26  # bytes whose copy is timed
ROUNDS = 3


class Away:
    """Storages of one tensor (or of all that a stage saved) and their copies on the host."""

    def __init__(self, storages: Sequence[torch.UntypedStorage], streams: Streams):
        self.storages, self.streams = storages, streams
        self.host: list[Tensor] = []
        self.sizes = [storage.nbytes() for storage in storages]
        self.done: torch.cuda.Event | None = None

    def leave(self) -> None:
        """Begin to copy to the host."""
        with self.streams.copying("out"):
            for storage in self.storages:
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self.streams.cuda)
                copy.copy_(_bytes(storage), non_blocking=True)
                self.host.append(copy)
            self.done = self.streams.event()

    def drop(self) -> None:
        """Wait for the copies and empty the storages."""
        self.streams.wait(self.done)
        for storage in self.storages:
            storage.resize_(0)

    def come_back(self) -> None:
        """Begin to copy back."""
        for storage, size in zip(self.storages, self.sizes, strict=True):
            storage.resize_(size)
        with self.streams.copying("in"):
            for storage, copy in zip(self.storages, self.host, strict=True):
                _bytes(storage).copy_(copy, non_blocking=True)
            self.done = self.streams.event()

    def arrive(self) -> None:
        """Wait until the tensors are back."""
        self.streams.wait(self.done)
        self.host.clear()


class Streams:
    """A stream for each direction, on a GPU."""

    def __init__(self, device: torch.device):
        self.cuda, self.device = device.type == "cuda", device
        self._streams: dict[str, torch.cuda.Stream] = {}

    def copying(self, direction: str) -> torch.cuda.StreamContext | _Nothing:
        """Run what is inside on the direction's stream, after what the current one has been given."""
        if not self.cuda:
            return _Nothing()
        stream = self._streams.setdefault(direction, torch.cuda.Stream(self.device))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def event(self) -> torch.cuda.Event | None:
        """Recorded on the current stream."""
        if not self.cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Transfers:
    """The transfers of one run of a schedule, by the numbers of its operations.

    Args:
        outside: storages that belong to nobody's stage, such as weights.
    """

    def __init__(self, transfers: Iterable[Transfer], streams: Streams, outside: set[int]):
        self.streams, self.outside = streams, outside
        self.away: dict[Transfer, Away] = {}
        self._moments: dict[tuple[str, int], list[Transfer]] = defaultdict(list)
        for transfer in sorted(transfers, key=lambda t: (t.after, t.gone)):
            for moment in ("after", "gone", "back", "needed"):
                self._moments[moment, getattr(transfer, moment)].append(transfer)

    def before(self, operation: int) -> None:
        """What must have happened, or begins, before an operation."""
        for transfer in self._moments["gone", operation]:
            self.away[transfer].drop()
        for transfer in self._moments["back", operation]:
            self.away[transfer].come_back()
        for transfer in self._moments["needed", operation]:
            self.away.pop(transfer).arrive()

    def after(self, operation: int, tensors: dict[tuple[str, int], list[Tensor]]) -> None:
        """What begins behind an operation, of the tensors that are held now by kind and number."""
        for transfer in self._moments["after", operation]:
            kind, number = transfer.name
            # what a stage read isn't its own, though it is among what it saved; later stages' aliases of its output are
            before = [n for n in tensors if n[1] < number or (kind == "saved" and n == ("x", number))]
            others = {_key(t) for name in before for t in tensors[name]}
            own = {
                _key(t): t.untyped_storage()
                for t in tensors.get(transfer.name, [])
                if _key(t) not in self.outside and _key(t) not in others
            }
            large = [storage for storage in own.values() if storage.nbytes() >= SMALLEST]
            self.away[transfer] = Away(large, self.streams)
            self.away[transfer].leave()


def host_bandwidth(device: torch.device) -> float:
    """Bytes a second of copies to the host, measured."""
    import time

    size = PROBE if device.type == "cuda" else PROBE // 64  # a CPU's memory prediction counts it
    probe, host = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda"),
    )
    best = float("inf")
    for _ in range(1 + ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        host.copy_(probe)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return size / best


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))

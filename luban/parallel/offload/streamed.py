"""Updates of state on a disk (Rajbhandari et al. 2021, ZeRO-Infinity, section 5.2): while one piece of weights and moments is updated
the next is read and the last one is written.

Pieces have one size whatever the matrices' are, so that the memory that they need is small and constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luban.core.errors import TrainingError
from luban.optim.adamw import AdamWGroups
from luban.optim.base import Optimizer, ParamGroups, Update
from luban.parallel.offload.direct import Buffer, done, rounded_up
from luban.parallel.offload.pools import DiskPool, Pool
from luban.planner.offload import PIECE, PIECES

MOMENTS = ("exp_avg", "exp_avg_sq")
ROUNDED = "rounded"  # is written alone


@dataclass(frozen=True)
class Span:
    """Numbers begin … end of a parameter and of its moments."""

    parameter: nn.Parameter
    begin: int
    end: int


class Part(NamedTuple):
    """What a piece has of one tensor in the file."""

    name: str
    span: Span
    tensor: Tensor
    place: int  # in the memory of the piece, in bytes
    offset: int  # in the file, in bytes
    size: int  # bytes of whole pages


@dataclass
class Slot:
    """Memory of a piece, and the requests that are under way in it."""

    buffer: Buffer
    requests: list[Future[None]] = field(default_factory=list)


def pieces(parameters: Sequence[nn.Parameter], numbers: int) -> Iterator[list[Span]]:
    """Spans of all parameters, in order, gathered into pieces of at most so many numbers; spans begin at multiples of it or at 0."""
    piece, left = [], numbers
    for parameter in parameters:
        for begin in range(0, parameter.numel(), numbers):
            span = Span(parameter, begin, min(begin + numbers, parameter.numel()))
            if span.end - begin > left:
                yield piece
                piece, left = [], numbers
            piece.append(span)
            left -= span.end - begin
    if piece:
        yield piece


class StreamedGroups(ParamGroups):
    """Adam over parameters whose weights and moments lie in a file.

    Args:
        algorithm: that updates what is in memory.
        pool: with a file for direct I/O, which may have half-precision weights, too.
        numbers: of a piece, a multiple of 1,024, so that pieces are whole pages and vectors.
    """

    def __init__(self, algorithm: ParamGroups, pool: DiskPool, numbers: int = PIECE):
        self.algorithm, self.pool, self.numbers = algorithm, pool, numbers
        self.groups, self.state = algorithm.groups, algorithm.state
        self.slots: list[Slot] = []

    def step(self, factor: float, update: Update) -> None:
        """Update every parameter that has a gradient, piece by piece.

        Raises:
            TrainingError: the disk failed in between.
        """
        if not update.apply:
            return
        stepped = [p for group in self.groups for p in group["params"] if p in update.gradients]
        for parameter in stepped:
            if not parameter.numel():  # of a process that has no row of it, for which no piece counts the step
                self.state[parameter]["step"] += 1
        work = list(pieces(stepped, self.numbers))
        self._allot(work, update)
        try:
            for index, piece in enumerate(work):
                if index == 0:
                    self._request("read", self._slot(0), piece, update)
                slot = self._slot(index)
                if index + 1 < len(work):
                    self._request("read", self._slot(index + 1), work[index + 1], update)
                done(slot.requests)
                self._update(factor, update, slot, piece)
                self._request("write", slot, piece, update)
            for slot in self.slots:
                done(slot.requests)
        except OSError as error:
            raise TrainingError(
                f"plan.offload_folder {self.pool.folder} failed in the middle of an update ({error.strerror or error}): "
                "weights on it are lost; go on from the last checkpoint"
            ) from None

    def _allot(self, work: Sequence[Sequence[Span]], update: Update) -> None:
        """Memory for the largest piece, once."""
        size = max((sum(part.size for part in self._parts(piece, update)) for piece in work), default=0)
        if not self.slots or len(self.slots[0].buffer.map) < size:
            self.slots = [Slot(Buffer(size)) for _ in range(PIECES)]

    def _slot(self, index: int) -> Slot:
        return self.slots[index % PIECES]

    def _parts(self, piece: Sequence[Span], update: Update) -> Iterator[Part]:
        """Of a piece's tensors that are in the file, in turn: weights, moments, rounded weights."""
        place = 0
        for span in piece:
            parameter = span.parameter
            tensors = {"weight": parameter.data, **{name: self.state[parameter][name] for name in MOMENTS}}
            tensors |= {ROUNDED: update.copies[parameter]} if parameter in update.copies else {}
            for name, tensor in tensors.items():
                offset = self.pool.offsets.get(tensor.data_ptr())
                if offset is None:  # in the host's memory
                    continue
                size = rounded_up((span.end - span.begin) * tensor.itemsize)
                yield Part(name, span, tensor, place, offset + span.begin * tensor.itemsize, size)
                place += size

    def _request(self, what: str, slot: Slot, piece: Sequence[Span], update: Update) -> None:
        """Begin to read or write a piece, once the slot is free."""
        done(slot.requests)
        assert self.pool.direct is not None
        call, slot.requests = getattr(self.pool.direct, what), []
        for part in self._parts(piece, update):
            if what == "write" or part.name != ROUNDED:
                slot.requests += call(slot.buffer, part.place, part.offset, part.size)

    def _update(self, factor: float, update: Update, slot: Slot, piece: Sequence[Span]) -> None:
        """Run the algorithm on the numbers in memory, which stand in for the file's meanwhile."""
        here: dict[Span, dict[str, Tensor]] = {}
        for part in self._parts(piece, update):
            count = part.span.end - part.span.begin
            here.setdefault(part.span, {})[part.name] = slot.buffer.tensor(part.place, count, part.tensor.dtype)
        held: dict[nn.Parameter, tuple[Tensor, dict[str, Tensor]]] = {}
        gradients: dict[nn.Parameter, Tensor] = {}
        copies: dict[nn.Parameter, Tensor] = {}
        try:
            for span, read in here.items():
                parameter, state, run = span.parameter, self.state[span.parameter], slice(span.begin, span.end)
                held[parameter] = parameter.data, {name: state[name] for name in MOMENTS}
                parameter.data = read["weight"]
                state.update({name: read[name] for name in MOMENTS})
                if span.begin:
                    state["step"] -= 1  # the whole parameter's, counted with its first span
                gradients[parameter] = update.gradients[parameter].reshape(-1)[run]
                if parameter in update.copies:
                    copies[parameter] = read.get(ROUNDED, update.copies[parameter].view(-1)[run])
            self.algorithm.step(factor, replace(update, gradients=gradients, copies=copies))
        finally:
            for parameter, (weights, moments) in held.items():
                parameter.data = weights
                self.state[parameter].update(moments)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Of the algorithm."""
        return self.algorithm.averages()


def keep_moments(optimizer: Optimizer, pool: Pool) -> None:
    """Put Adam's moments into a pool; those on a disk are streamed through memory from now on."""
    for algorithm in optimizer.algorithms:
        assert isinstance(algorithm, AdamWGroups)
        for parameter, state in algorithm.state.items():
            state.update({name: pool.zeros(parameter.shape, parameter.dtype) for name in MOMENTS})
            state["step"] = torch.zeros(())
    if isinstance(pool, DiskPool) and pool.direct is not None:
        streamed: list[ParamGroups] = [StreamedGroups(algorithm, pool) for algorithm in optimizer.algorithms]
        optimizer.algorithms = streamed

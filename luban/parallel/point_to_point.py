"""Every collective as an explicit algorithm over point-to-point sends, with the bytes that it sends counted.

Ring all-reduce (Patarasuk & Yuan 2009): N − 1 steps in which chunks go round and are summed (reduce-scatter), N − 1 in which
the sums go round (all-gather). Both directions of the ring carry half of every chunk, and halves travel in pieces, so that a
process adds up one piece while the next is on its way. NCCL transfers run on a stream of their own, sums on the caller's.

K bytes of the whole tensor, N processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

PIECES = 2  # of the half of a chunk; more make messages that NVLink is too fast for
DIRECTIONS = (1, -1)


@dataclass(frozen=True)
class Move:
    """One message out and one in, which travel at the same time."""

    to: int  # rank in the group
    sent: Tensor
    source: int  # rank in the group
    received: Tensor  # where the message goes, or what it is added to
    adds: bool = False


@dataclass
class PointToPoint:
    """The collectives of one process of a group.

    Args:
        group: of processes that all call the same collectives in the same order.
        pieces: that a message is cut into.
        more: groups of the same processes that pieces take turns in with `group`: with NCCL messages of one group follow each
            other, those of several begin while others end.

    Tensors are contiguous; `sent` counts the bytes that this process has sent.
    """

    group: dist.ProcessGroup
    pieces: int = PIECES
    more: Sequence[dist.ProcessGroup] = ()
    sent: int = 0
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self):
        self.rank, self.size = dist.get_rank(self.group), self.group.size()
        self._lanes = (self.group, *self.more)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place: 2(N − 1)/N · K bytes a process."""
        parts = self._parts(x)
        self._run([*self._reduce_round(parts), *self._gather_round(parts)])
        return x

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """This process's N-th, along the flat tensor, of the sum: (N − 1)/N · K bytes a process."""
        summed = x.clone()
        self._run(self._reduce_round(self._parts(summed)))
        return summed.view(-1).tensor_split(self.size)[self.rank].clone()

    def all_gather(self, x: Tensor) -> Tensor:
        """(N, *shape) the tensors of all processes, each K/N bytes: (N − 1)/N · K bytes a process."""
        found = x.new_empty(self.size, *x.shape)
        found[self.rank] = x
        self._run(self._gather_round(self._parts(found)))
        return found

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """The root's tensor, in place, passed from process to process: K bytes from each but the last."""
        place = (self.rank - root) % self.size
        self._pass_on(x, place, adds=False)
        return x

    def reduce(self, x: Tensor, root: int = 0) -> Tensor:
        """The sum at the root, in place, on the way through all processes: K bytes from each but the root. What the other
        processes hold afterwards is a part of the sum."""
        place = (self.rank - root - 1) % self.size
        self._pass_on(x, place, adds=True)
        return x

    def all_to_all(self, x: Tensor) -> Tensor:
        """(N, …) → (N, …), row j to process j: (N − 1)/N · K bytes a process."""
        found = torch.empty_like(x)
        found[self.rank] = x[self.rank]
        moves = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            moves.append(Move(to, x[to], source, found[source]))
        self._exchange(moves)
        return found

    def gather(self, x: Tensor, root: int = 0) -> Tensor | None:
        """(N, *shape) the tensors of all processes, each K/N bytes, at the root: K/N bytes from each other process."""
        nothing = x.new_empty(0)
        if self.rank != root:
            self._exchange([Move(root, x, root, nothing)])
            return None
        found = x.new_empty(self.size, *x.shape)
        found[root] = x
        self._exchange([Move(k, nothing, k, found[k]) for k in range(self.size) if k != root])
        return found

    def scatter(self, x: Tensor | None, like: Tensor, root: int = 0) -> Tensor:
        """Row j of the root's (N, *shape) tensor, in process j: (N − 1)/N · K bytes from the root.

        Args:
            x: the rows at the root; None elsewhere.
            like: of a row's shape and dtype.
        """
        nothing, found = like.new_empty(0), torch.empty_like(like)
        if x is None:
            self._exchange([Move(root, nothing, root, found)])
            return found
        self._exchange([Move(k, x[k], k, nothing) for k in range(self.size) if k != root])
        return found.copy_(x[root])

    def shift(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to send a tensor to the next process of the ring, and to receive one like it from the process before: K bytes.
        The function that is returned waits for what comes, and returns it."""

        def wait() -> Tensor:
            exchange.finish()
            return received

        received, after, before = torch.empty_like(x), (self.rank + 1) % self.size, (self.rank - 1) % self.size
        exchange = self._start([Move(after, x, before, received)])
        return wait

    def _parts(self, x: Tensor) -> list[list[list[Tensor]]]:
        """Views: direction → chunk → piece."""
        chunks = [chunk.tensor_split(2) for chunk in x.view(-1).tensor_split(self.size)]
        return [[list(halves[d].tensor_split(self.pieces)) for halves in chunks] for d in range(2)]

    def _reduce_round(self, parts: list[list[list[Tensor]]]) -> Iterator[list[Move]]:
        """Afterwards the chunk with this process's number is summed."""
        return self._round(parts, first=1, adds=True)

    def _gather_round(self, parts: list[list[list[Tensor]]]) -> Iterator[list[Move]]:
        """From every process's own chunk."""
        return self._round(parts, first=0, adds=False)

    def _round(self, parts: list[list[list[Tensor]]], *, first: int, adds: bool) -> Iterator[list[Move]]:
        """Step s sends the chunk that step s − 1 received; `first`: how many places behind this process's own step 0's is."""
        for step in range(self.size - 1):
            for piece in range(self.pieces):
                moves = []
                for direction, chunks in zip(DIRECTIONS, parts, strict=True):
                    out = (self.rank - direction * (first + step)) % self.size
                    into = (out - direction) % self.size
                    to, source = (self.rank + direction) % self.size, (self.rank - direction) % self.size
                    moves.append(Move(to, chunks[out][piece], source, chunks[into][piece], adds))
                yield moves

    def _run(self, rounds: Sequence[list[Move]] | Iterator[list[Move]]) -> None:
        """Start each exchange once the one `pieces` before it, whose piece it passes on, has been added up. Those in between
        are on their way meanwhile."""
        in_flight: deque[Exchange] = deque()
        for number, moves in enumerate(rounds):
            if len(in_flight) == self.pieces:
                in_flight.popleft().finish()
            in_flight.append(self._start(moves, self._lanes[number % self.pieces % len(self._lanes)]))
        for exchange in in_flight:
            exchange.finish()

    def _pass_on(self, x: Tensor, place: int, *, adds: bool) -> None:
        """Pass a tensor along the line of processes, `place` counted from its start: while a piece comes in the one before it
        leaves."""
        pieces = x.view(-1).tensor_split(self.size * self.pieces)
        behind, ahead = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        nothing, begins, ends = x.new_empty(0), place == 0, place == self.size - 1
        for k in range(len(pieces) + 1):
            sent = pieces[k - 1] if k and not ends else nothing
            received = pieces[k] if k < len(pieces) and not begins else nothing
            self._exchange([Move(ahead, sent, behind, received, adds)])

    def _exchange(self, moves: Sequence[Move]) -> None:
        self._start(moves).finish()

    def _start(self, moves: Sequence[Move], lane: dist.ProcessGroup | None = None) -> Exchange:
        """Begin messages; those without numbers are left out by both sides."""
        group, operations, sums = lane or self.group, [], []
        for move in moves:
            if move.sent.numel():
                self.sent += move.sent.numel() * move.sent.element_size()
                operations.append(dist.P2POp(dist.isend, move.sent, group=group, group_peer=move.to))
        for move in moves:
            if move.received.numel():
                into = torch.empty_like(move.received) if move.adds else move.received
                operations.append(dist.P2POp(dist.irecv, into, group=group, group_peer=move.source))
                if move.adds:
                    sums.append((move.received, into))
        return Exchange(dist.batch_isend_irecv(operations) if operations else [], sums)


@dataclass
class Exchange:
    """Messages that are on their way."""

    works: list[dist.Work]
    sums: list[tuple[Tensor, Tensor]]  # what to add to, and what is received for it

    def finish(self) -> None:
        """Wait for the messages (on CUDA the stream does) and add up what they brought."""
        for work in self.works:
            work.wait()
        if self.sums:
            torch._foreach_add_([into for into, _ in self.sums], [term for _, term in self.sums])

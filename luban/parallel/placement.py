"""Which part of each parameter the processes of the axis tensor hold, and how parts are cut, drawn and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from luban.nn.init import Region, cut
from luban.parallel.shard import local_region, message_device

Run = tuple[int, int]  # begin and end along the divided dimension


@dataclass(frozen=True)
class Placement:
    """The parts of one parameter along one dimension. A part may come several times, in several processes or in one."""

    shape: tuple[int, ...]  # of the whole
    dim: int  # the divided dimension
    runs: tuple[tuple[Run, ...], ...]  # of each process, in the order in which it holds them; none: it holds nothing

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of what a process holds."""
        shape = list(self.shape)
        shape[self.dim] = sum(end - begin for begin, end in self.runs[rank])
        return tuple(shape)

    def copies(self) -> Tensor | None:
        """(size,) how often each index along the dimension is held; None: all once."""
        count = torch.zeros(self.shape[self.dim], dtype=torch.float64)
        for begin, end in (run for runs in self.runs for run in runs):
            count[begin:end] += 1
        return None if bool((count == 1).all()) else count

    def index(self, rank: int) -> Tensor:
        """The indices in the whole along the dimension, in the order of the local ones."""
        return torch.cat([torch.arange(0), *(torch.arange(begin, end) for begin, end in self.runs[rank])])

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """What a process holds of the whole, as a new tensor."""
        return whole.index_select(self.dim, self.index(rank).to(whole.device))


def replicated(shape: Sequence[int], ranks: int) -> Placement:
    """The whole in every process."""
    return Placement(tuple(shape), 0, (((0, shape[0] if shape else 1),),) * ranks)


def on_first(shape: Sequence[int], ranks: int) -> Placement:
    """The whole in the first process, and nothing in the others."""
    return Placement(tuple(shape), 0, (((0, shape[0]),), *(() for _ in range(ranks - 1))))


@dataclass(frozen=True)
class Placements:
    """The placements of a model's parameters by name, as one process of the axis tensor sees them.

    Parameters without a placement are whole in every process, and their gradients are alike there. `partial` ones are whole
    as well, but each process sees only some of the tokens or heads that they act on, so that their gradients are summed.
    """

    divided: Mapping[str, Placement] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    experts: Placements | None = None  # those that plan.expert divides, over the processes of its own group

    def _of(self, name: str) -> Placements:
        """The placements that know the parameter."""
        return self.experts if self.experts is not None and name in self.experts.divided else self

    def holds(self, name: str) -> bool:
        """Whether this process has a part of the parameter."""
        return name not in self.divided or bool(self.divided[name].runs[self.rank])

    def region(self, name: str, tensor: Tensor, values: Tensor | None = None) -> Region:
        """The parts of a parameter that lie here; FSDP may have divided what the axis tensor left.

        Args:
            values: of the shape of what lies here, whose parts are given instead of the parameter's.
        """
        if (own := self._of(name)) is not self:
            return own.region(name, tensor, values)
        local, begins = local_region(tensor)
        local = local if values is None else values
        placement = self.divided.get(name)
        if placement is None:
            return Region(tensor.shape, [(local, begins)])
        dim, pieces, at = placement.dim, [], 0
        first, past = begins[dim], begins[dim] + local.shape[dim]
        for begin, end in placement.runs[self.rank]:
            low, high = max(at, first), min(at + end - begin, past)
            if low < high:
                where = list(begins)
                where[dim] = begin + low - at
                pieces.append((local.narrow(dim, low - first, high - low), tuple(where)))
            at += end - begin
        return Region(placement.shape, pieces)

    @torch.no_grad()
    def take(self, name: str, tensor: Tensor, whole: Tensor) -> None:
        """Copy into a tensor, in place, what of the whole lies here."""
        for local, begins in self.region(name, tensor).pieces:
            local.copy_(cut(whole, local, begins))

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """What this process's part of the axis tensor is of a whole tensor that is like the parameter; others as they are."""
        own = self._of(name)
        placement = own.divided.get(name)
        if placement is None or whole.shape != placement.shape:
            return whole
        return placement.cut(whole, own.rank)

    @torch.no_grad()
    def whole(self, name: str, local: Tensor | None) -> Tensor | None:
        """The whole of a tensor that is like the parameter, where it was. Every process of the axis must call it; those that
        hold nothing pass None."""
        if (own := self._of(name)) is not self:
            return own.whole(name, local)
        placement = self.divided.get(name)
        if placement is None or (local is not None and local.shape != placement.local_shape(self.rank)):
            return local
        held = [rank for rank, runs in enumerate(placement.runs) if runs]
        if len(held) == 1:  # the first process's alone
            return local
        assert local is not None and self.group is not None
        shapes = [placement.local_shape(rank) for rank in range(self.ranks)]
        size = max(torch.Size(shape).numel() for shape in shapes)
        padded = local.new_zeros(size, device=message_device(self.group))
        padded[: local.numel()] = local.reshape(-1)
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded, group=self.group)
        found = torch.empty(placement.shape, dtype=local.dtype, device=local.device)
        for rank, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            values = part[: torch.Size(shape).numel()].view(shape).to(local.device)
            found.index_copy_(placement.dim, placement.index(rank).to(local.device), values)
        return found

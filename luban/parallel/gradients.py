"""The gradients of a step, summed over the processes that share a parameter, and their global norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from luban.optim.clip import global_norm
from luban.parallel.placement import Placement, Placements
from luban.parallel.shard import message_device
from luban.parallel.world import World

BUCKET = 1 << 25  # numbers summed by one all-reduce


class Shared(NamedTuple):
    """A parameter that several processes of the pipeline hold."""

    count: int  # how many
    shape: tuple[int, ...]  # of what each has
    group: dist.ProcessGroup | None  # those processes; None: this one isn't among them


@dataclass(frozen=True)
class GradientSums:
    """Sums gradients by the parameters' names; every process must call it with those of one step.

    Args:
        placements: how the axis tensor divides the parameters.
        staged: parameters that several processes of the pipeline hold.
        begins: the index along dimension 0 at which FSDP's shard of a parameter begins; 0 for others.
    """

    world: World = field(default_factory=World)
    placements: Placements = field(default_factory=Placements)
    begins: Mapping[str, int] = field(default_factory=dict)
    staged: Mapping[str, Shared] = field(default_factory=dict)
    summed: bool = False  # over copies and shards already, when they arrive
    apart: Mapping[str, int] = field(default_factory=dict)  # see `luban.parallel.expert.held_apart`

    @torch.no_grad()
    def sum(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums, in fp32 (fp64 for fp64): over copies of the model, over terms of the axis tensor, over stages."""
        if self.world.size == 1:
            return dict(gradients)
        found = {name: gradient for name, gradient in gradients.items() if name not in self.apart}
        if not self.summed:
            for group in self.world.sharing_groups("replicate"):
                found = _summed(found, group)
        if self.world.plan.tensor > 1:
            partial = {name: found[name] for name in found if name in self.placements.partial}
            found |= _summed(partial, self.world.group("tensor"))
            for name in self._repeated(found):
                found[name] = self._sum_repeated(name, found[name])
        return found | self._over_stages(found) | self._sum_apart(gradients)

    def _sum_apart(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of what is held apart, over all processes of the stage that hold it."""
        if not self.apart:
            return {}
        stage = self.world.plan.processes // self.world.plan.pipeline
        routers = {name: gradients[name] for name in gradients if self.apart.get(name) == stage}
        experts = {name: gradients[name] for name in gradients if self.apart.get(name, stage) != stage}
        for group in self.world.sharing_groups("replicate", "shard", "tensor"):
            routers = _summed(routers, group)
        if experts and self.world.experts is not None and self.world.experts["copies"].size() > 1:
            experts = _summed(experts, self.world.experts.get_group("copies"))
        return routers | experts

    def _over_stages(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of what several stages use (tied embeddings, biases of positions), over the processes that hold it."""
        terms: dict[dist.ProcessGroup, dict[str, Tensor]] = {}
        for name, (_, shape, group) in self.staged.items():
            if group is not None:
                gradient = gradients.get(name)
                like = next(iter(gradients.values())) if gradient is None else gradient
                terms.setdefault(group, {})[name] = like.new_zeros(shape) if gradient is None else gradient
        found: dict[str, Tensor] = {}
        for group, mine in terms.items():  # in all processes in the same order
            found |= _summed(mine, group)
        return found

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The global norm of summed gradients: every number counts once, wherever it is held."""
        if self.world.size == 1:
            return global_norm(list(gradients.values()))
        weighted = [self._weighted(name, gradient) for name, gradient in gradients.items() if name not in self.apart]
        squared = global_norm(weighted).square() if weighted else torch.zeros(())
        axes = ("shard", "tensor", "pipeline")
        for group in self.world.sharing_groups(*axes):
            squared = _all_reduced(squared, group)
        if self.apart:
            squared = squared + self._squared_apart(gradients, like=squared)
        return squared.sqrt()

    def _squared_apart(self, gradients: Mapping[str, Tensor], *, like: Tensor) -> Tensor:
        """The square of the norm of what is held apart, over all processes."""
        weighted = [gradients[name] * count**-0.5 for name, count in self.apart.items() if name in gradients]
        squared = global_norm(weighted).square().to(like) if weighted else torch.zeros_like(like)
        return _all_reduced(squared, dist.group.WORLD)

    def _repeated(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Divided parameters of which some part is in several places."""
        return [n for n, p in self.placements.divided.items() if n in gradients and p.copies() is not None]

    def _rows(self, placement: Placement, name: str, size: int) -> Tensor:
        """Indices in the whole of this process's rows of a parameter that is divided along dimension 0."""
        begin = self.begins.get(name, 0)
        return placement.index(self.placements.rank)[begin : begin + size]

    def _sum_repeated(self, name: str, gradient: Tensor) -> Tensor:
        """The sum over all copies of a row, wherever they are."""
        placement = self.placements.divided[name]
        rows = self._rows(placement, name, gradient.shape[0]).to(gradient.device)
        whole = gradient.new_zeros(placement.shape).index_add_(0, rows, gradient)
        for group in self.world.sharing_groups("tensor", *(["shard"] if self.world.shards > 1 else [])):
            whole = _all_reduced(whole, group)
        return whole[rows]

    def _weighted(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient times 1/√n, n the number of processes (of tensor and pipeline) that hold each number."""
        placement, tensor = self.placements.divided.get(name), self.world.plan.tensor
        if name in self.staged:
            gradient = gradient * self.staged[name].count ** -0.5
        if placement is not None:
            copies = placement.copies()
            if copies is None:
                return gradient
            rows = self._rows(placement, name, gradient.shape[0])
            factor = copies[rows].rsqrt().to(gradient)
            return gradient * factor.view(-1, *(1,) * (gradient.dim() - 1))
        return gradient * tensor**-0.5 if tensor > 1 else gradient


def _summed(gradients: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The sums over a group, several gradients in one all-reduce."""
    found: dict[str, Tensor] = {}
    for bucket in _buckets(gradients):
        tensors = [gradients[name] for name in bucket]
        flat = torch.cat([t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
        flat = _all_reduced(flat, group)
        parts = flat.split([t.numel() for t in tensors])
        found |= {name: part.view(t.shape) for name, part, t in zip(bucket, parts, tensors, strict=True)}
    return found


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over a group, where the tensor is; one on the host goes over the device if the group's messages do."""
    assert group is not None
    moved = tensor if tensor.is_cuda else tensor.to(message_device(group))
    dist.all_reduce(moved, group=group)
    return moved.to(tensor.device)


def _buckets(gradients: Mapping[str, Tensor]) -> Sequence[list[str]]:
    """Names in order, about BUCKET numbers together, each bucket of one dtype."""
    found: list[list[str]] = []
    held, last = 0, None
    for name, gradient in gradients.items():
        if not found or held + gradient.numel() > BUCKET or gradient.dtype != last:
            found.append([])
            held = 0
        found[-1].append(name)
        held, last = held + gradient.numel(), gradient.dtype
    return found

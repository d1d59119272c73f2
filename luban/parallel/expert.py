"""Expert parallelism: processes that hold different experts, and the rows that they send each other (Lepikhin et al. 2021).

`plan.expert` N divides shard · context · tensor: N processes side by side hold the experts of every mixture, X/N each, and each
sends the rows of its tokens to the processes that have their experts, and gets them back (two all-to-alls a layer, two more in
the backward pass). Copies of an expert sum their gradients over the processes that hold it, which needs no message inside
of the N. Under plan.tensor, whose processes read the same tokens, each sends those of its share.

M rows that go out, R rows that come in, X experts, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.base import Model
from luban.nn.moe.experts import ExpertProjection, Experts
from luban.nn.moe.layer import Exchange, counted
from luban.parallel.collectives import Peers, sum_parts
from luban.parallel.placement import Placement, Placements
from luban.parallel.routers import routers_of
from luban.parallel.world import World


def check_experts(model: Model, plan: ParallelPlan) -> None:
    """Raise ConfigError unless a model's mixtures can be spread by the plan; the message names one that can be."""
    layers = routers_of(model)
    if plan.expert > 1 and not layers:
        raise ConfigError("plan.expert divides the experts of mixtures, and this model has none: leave it out")
    if layers and plan.offload != "none" and plan.shards_by_layer:
        raise ConfigError(
            "plan.offload does not go with mixtures of experts whose weights are gathered layer by layer (plan.zero 3, or shards of "
            "pipelines), beside which routers stay on the device: use --plan.zero 2 without plan.pipeline"
        )
    for layer in layers.values():
        if layer.count % plan.expert:
            fits = max(n for n in range(1, plan.expert) if layer.count % n == 0 and plan.expert_processes % n == 0)
            raise ConfigError(
                f"plan.expert {plan.expert} can't divide {layer.count} experts evenly: use --plan.expert {fits}"
            )
        if plan.context > 1 and layer.choice.drops:
            name = layer.choice.registry.name_of(type(layer.choice))
            raise ConfigError(
                f"the router {name} counts the tokens of whole rows, which plan.context divides: use --plan.shard, or the "
                "router top_k"
            )


def divide_experts(model: Model, world: World, placements: Placements) -> Placements:
    """Prepare a model's mixtures on the meta device: row sums over the axis context, and each process's share of the experts."""
    plan = world.plan
    layers = routers_of(model)
    if not layers:
        return placements
    context = Peers.of(world.group("context")) if plan.context > 1 else None
    if plan.expert == 1:
        for layer in layers.values():
            layer.exchange = RowSums(context)
        return placements
    group = world.expert_group
    rank, tensor = dist.get_rank(group), (world.index("tensor"), plan.tensor)
    divided: dict[str, Placement] = {}
    for name, layer in layers.items():
        layer.exchange = AllToAll(context, group, tensor)
        size = layer.count // plan.expert
        runs = tuple(((part * size, (part + 1) * size),) for part in range(plan.expert))
        for path, projection in layer.experts.named_modules():
            if isinstance(projection, ExpertProjection):
                weight = projection.weight
                placement = Placement(tuple(weight.shape), 0, runs)
                divided[f"{name}.experts.{path}.weight"] = placement
                empty = weight.new_empty(placement.local_shape(rank))
                projection.weight = nn.Parameter(empty, weight.requires_grad)
    experts = Placements(divided, rank=rank, ranks=plan.expert, group=group)
    return replace(placements, partial=placements.partial - divided.keys(), experts=experts)


def held_apart(model: Model, world: World) -> dict[str, int]:
    """Parameters that FSDP and the sums of other gradients leave alone → how many processes of a stage hold each number: experts
    that plan.expert divides, and routers beside FSDP, which would cast them to half precision.

    Args:
        model: the whole one, so that all processes find the same, whatever their stages have.
    """
    plan, found = world.plan, {}
    stage = plan.processes // plan.pipeline
    for name, layer in routers_of(model).items():
        if plan.expert > 1:
            found |= {f"{name}.experts.{path}": stage // plan.expert for path, _ in layer.experts.named_parameters()}
        if plan.shard > 1:
            found[f"{name}.router.weight"] = stage
    return found


class RowSums(Exchange):
    """All experts here; rows of tokens that the axis context may divide."""

    def __init__(self, context: Peers | None):
        self.context = context

    def row_sum(self, local: Tensor) -> Tensor:
        """The sum over the processes that have the row's other tokens; each gets the gradient of its own."""
        return local if self.context is None else sum_parts(local, self.context)


class AllToAll(RowSums):
    """Experts divided among the processes of `group`.

    Args:
        tensor: index and size of the axis whose processes read the same tokens.
    """

    def __init__(self, context: Peers | None, group: dist.ProcessGroup, tensor: tuple[int, int]):
        super().__init__(context)
        self.group, self.tensor = group, tensor

    def mine(self, rows_N: Tensor) -> Tensor | None:
        """Every tensor-th token."""
        index, size = self.tensor
        return None if size == 1 else rows_N % size == index

    def run(self, experts: Experts, rows_ME: Tensor, experts_M: Tensor, count: int) -> Tensor:
        """(M, E) → (M, E). The host waits for the numbers of rows, as the messages' sizes depend on them."""
        ranks = self.group.size()
        own = count // ranks
        going_X = counted(experts_M, count)
        coming_X = torch.empty_like(going_X)
        dist.all_to_all_single(coming_X, going_X, group=self.group)
        coming = coming_X.view(ranks, own)  # rows from each process for each of my experts
        numbers = torch.stack([going_X.view(ranks, own).sum(1), coming.sum(1)]).tolist()
        received_RE = _AllToAll.apply(rows_ME, numbers[0], numbers[1], self.group)
        expert_R = torch.arange(own, device=rows_ME.device).repeat(ranks).repeat_interleave(coming.flatten())
        order_R = expert_R.argsort(stable=True)
        made_RE = experts(received_RE.index_select(0, order_R), coming.sum(0))
        back_RE = torch.empty_like(made_RE).index_copy(0, order_R, made_RE)
        return _AllToAll.apply(back_RE, numbers[1], numbers[0], self.group)


class _AllToAll(torch.autograd.Function):
    """Rows to and from all processes; the gradient goes back the way that the rows came."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, going: Sequence[int], coming: Sequence[int], group: Any) -> Tensor:
        ctx.going, ctx.coming, ctx.group = going, coming, group
        return _exchanged(rows, going, coming, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchanged(gradient, ctx.coming, ctx.going, ctx.group), None, None, None


def _exchanged(rows: Tensor, going: Sequence[int], coming: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    found = rows.new_empty(sum(coming), rows.shape[1])
    dist.all_to_all_single(found, rows.contiguous(), list(coming), list(going), group=group)
    return found

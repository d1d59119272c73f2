"""A model's parts, and how they come to the processes: the first one has the whole, and sends each what it holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from luban.core.errors import UnsupportedError
from luban.core.plan import ParallelPlan
from luban.generate.cache import float_parameter
from luban.generate.paged_cache import paging_refusal
from luban.load.model import LoadedModel
from luban.models.base import Model
from luban.models.build import build_model, materialise, state_of
from luban.models.spec import ModelSpec
from luban.nn.linear import matmul_owners, store_column_major
from luban.parallel.mixers import check_mixers
from luban.parallel.placement import Placements
from luban.parallel.tensor import WholeTokens, check_tensor, divide
from luban.serve.tensor.ranks import Ranks

OTHER_AXES = ("replicate", "shard", "pipeline", "context", "expert")


@dataclass(frozen=True)
class Shape:
    """What a process is told of the model that it will hold a part of."""

    spec: ModelSpec
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Model) -> Shape:
        """Of a whole model."""
        return cls(model.spec, float_parameter(model).dtype)


def require_divisible(model: LoadedModel, plan: ParallelPlan) -> None:
    """Raise UnsupportedError or ConfigError, with what is in the way, where a model can't be served under a plan."""
    if others := [axis for axis in OTHER_AXES if getattr(plan, axis) > 1]:
        raise UnsupportedError(f"a model is served under plan.tensor alone: leave plan.{others[0]} out")
    spec, refusal = model.spec, paging_refusal(model.module)
    shapes = [layer.mixer.attention(spec.width) for layer in spec.layers]
    for refused, what in (
        (spec.body.two_sided, "encoder–decoders"),
        (model.adapter is not None, "a model with an adapter (luban export --merge puts it into the weights)"),
        (any(owner.packed is not None for _, owner in matmul_owners(model.module)), "weights in 8 bits"),
        (any(shape is not None and shape.layout is not None for shape in shapes), "block-sparse layouts"),
        (refusal is not None, f"a model whose keys and values can't be kept in blocks ({refusal})"),
    ):
        if refused:
            raise UnsupportedError(f"{model.name} can't be served under plan.tensor, which doesn't go with {what}")
    check_mixers(spec, plan)
    check_tensor(build_model(spec, device="meta"), plan.tensor)


def divided_module(shape: Shape, ranks: Ranks) -> tuple[Model, Placements]:
    """This process's part of a model, its weights unset, and the parts of all."""
    module = build_model(shape.spec, device="meta", dtype=shape.dtype)
    placements = divide(module, ranks.peers, ranks.group, tokens=WholeTokens)
    materialise(module, ranks.device)
    return module.eval(), placements


@torch.no_grad()
def send_weights(whole: Model, part: Model, placements: Placements, ranks: Ranks) -> None:
    """From the first process, which takes its part of a whole model's weights and sends the others theirs, a tensor at a time."""
    own = state_of(part)
    for name, tensor in state_of(whole).items():
        placement = placements.divided.get(name)
        for rank in range(ranks.size):
            if placement is not None and not placement.runs[rank]:
                continue
            held = (tensor if placement is None else placement.cut(tensor, rank)).to(ranks.device)
            if rank == ranks.rank:
                own[name].copy_(held)
            else:
                dist.send(held.contiguous(), rank, group=ranks.group)
    store_column_major(part)


@torch.no_grad()
def receive_weights(part: Model, ranks: Ranks) -> None:
    """The other end of `send_weights`."""
    for tensor in state_of(part).values():
        dist.recv(tensor, 0, group=ranks.group)
    store_column_major(part)

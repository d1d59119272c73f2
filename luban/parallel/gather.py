"""Named tensors of which each process has some, put together in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luban.parallel.shard import message_device
from luban.parallel.world import World


def together(found: Mapping[str, Tensor | None], world: World) -> dict[str, Tensor]:
    """The tensors of all processes along the axes tensor and pipeline, in the order of the first that has each. Every
    process must call it.

    Args:
        found: None stands for a tensor that another process has.
    """
    mine = {name: tensor for name, tensor in found.items() if tensor is not None}
    for axis in ("tensor", "pipeline"):
        if getattr(world.plan, axis) > 1:
            mine = _together(mine, world.group(axis))
    return mine


def _together(mine: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    described: list[Any] = [None] * group.size()
    dist.all_gather_object(described, {n: (tuple(t.shape), t.dtype) for n, t in mine.items()}, group=group)
    device, rank = message_device(group), dist.get_rank(group)
    known: set[str] = set()
    whole: dict[str, Tensor] = {}
    for source, names in enumerate(described):
        for name, (shape, dtype) in names.items():
            if name in known:
                continue
            known.add(name)
            if all(name in others for others in described):
                tensor = mine[name]
            else:
                tensor = mine[name].to(device) if rank == source else torch.empty(shape, dtype=dtype, device=device)
                dist.broadcast(tensor, group_src=source, group=group)
            whole[name] = tensor.cpu()
    return whole

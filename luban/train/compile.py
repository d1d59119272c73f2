"""How a model and its objective become one function from a batch to a summed loss, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luban.objectives.family import Objective

LossFunction = Callable[..., Tensor]  # a batch's arrays → fp32 sum of losses


def loss_function(module: nn.Module, objective: Objective, *, compiled: bool, regions: bool = False) -> LossFunction:
    """The summed loss of a batch as one function.

    Args:
        compiled: by torch.compile, without graph breaks; recurrent bodies, which ask how long their documents are, have them.
        regions: compile every block by itself instead of the whole. Blocks are alike, so that only one of them is
            really compiled, whatever the depth; what is lost is fusion across their borders.
    """

    def summed(*arrays: Tensor) -> Tensor:
        return objective.loss(module, *arrays)[0]

    if not compiled:
        return summed
    found = compilable_regions(module) if regions else []
    if not found:
        return torch.compile(summed, dynamic=False, fullgraph=bool(stacked_blocks(module)))
    for region in found:
        region.compile(dynamic=False, fullgraph=True)
    return summed


def stacked_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of every stack in the module."""
    return [block for part in _stacks(module) for block in part.blocks]


def compilable_regions(module: nn.Module) -> list[nn.Module]:
    """The blocks of every stack, and the norm behind each stack."""
    norms = [getattr(part, "norm", None) for part in _stacks(module)]
    own = [norm for norm in norms if norm is not None and not type(norm).__module__.startswith("torch.")]
    return [*stacked_blocks(module), *own]  # torch's own norms are one kernel already, and never compiled alone


def _stacks(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(getattr(part, "blocks", None), nn.ModuleList)]

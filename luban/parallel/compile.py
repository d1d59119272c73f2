"""torch.compile over a loss module: as one graph, or layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from luban.models.stack import blocks_of, stacks_of
from luban.objectives.base import LossModule, LossOutput, TensorBatch

LossFunction = Callable[[TensorBatch], LossOutput]
OVERLAP = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["reorder_compute_for_overlap"],
}


def compiled_loss(loss: LossModule, *, regions: bool, whole: bool = True, overlap: bool = False) -> LossFunction:
    """The loss of a batch, compiled.

    Args:
        regions: compile every layer by itself instead of the whole. Layers that are alike share one graph, whatever the
            depth; what is lost is fusion across their borders.
        whole: every region, or the whole loss, must be one graph.
        overlap: messages begin as soon as they can and are waited for as late as they can, with what depends on none of them
            in between.
    """
    options = OVERLAP if overlap else None
    found = compilable_regions(loss) if regions else []
    if not found:
        return torch.compile(loss, dynamic=False, fullgraph=whole and bool(blocks_of(loss)), options=options)
    for region in found:
        region.compile(dynamic=False, fullgraph=whole, options=options)
    # The regions' code is shared, and torch allows a piece of code 8 graphs; a model may have more kinds of layer.
    limit = torch._dynamo.config.recompile_limit + len(found)

    def run(batch: TensorBatch) -> LossOutput:
        with torch._dynamo.config.patch(recompile_limit=limit):
            return loss(batch)

    return run


def compilable_regions(module: nn.Module) -> list[nn.Module]:
    """The blocks of every stack, and the norm behind each stack."""
    norms = [stack.norm for stack in stacks_of(module) if stack.norm is not None]
    own = [norm for norm in norms if not type(norm).__module__.startswith("torch.")]
    return [*blocks_of(module), *own]  # torch's own norms are one kernel already

"""What is computed again in the backward pass instead of being kept (Chen et al. 2016, section 3)."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luban.nn.feedforward import GatedFeedForward

Recompute = Literal["none", "cheap", "blocks"]

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.linear.default, aten._scaled_mm.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip
OWN = {
    "luban.flash_forward.default",
    "luban.flash4_forward.default",
    "luban.gated_products.default",
    "luban.rotate_packed.default",
}  # the last is what attention keeps


def recompute_blocks(blocks: list[nn.Module], what: Recompute) -> None:
    """Let each block forget in its forward pass what `what` says, in place.

    "cheap" keeps matrix products and attention and computes norms, rotations, activations and sums again: most of the
    memory for almost no time, as those are bound by the reading that the backward pass does anyhow. "blocks" keeps
    only what goes into each block, for a forward pass more.
    """
    if what == "none":
        return
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_says_something_new)
    for block in blocks:
        block.__class__ = _recomputing(type(block), what)
        for part in block.modules():
            if isinstance(part, GatedFeedForward):
                part.keeps_inner = False


def _says_something_new(record: logging.LogRecord) -> bool:
    """Compiling "cheap" warns of operations in place inside of blocks, which have none."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


@cache
def _recomputing(block: type[nn.Module], what: Recompute) -> type[nn.Module]:
    """The class of block whose forward is checkpointed: a class, so that all blocks share one compiled forward."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def forward(self: nn.Module, x: Tensor, frame: Any, position: nn.Module, layer: int, *memory: Any) -> Tensor:
        # Without a cache only what an encoder left is looked up by layer; a number that changes from block to block
        # would be compiled anew for each.
        return checkpoint(block.forward, self, x, frame, position, layer if memory else 0, *memory, **options)

    return type(block.__name__, (block,), {"forward": forward})


def _keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operation in PRODUCTS or str(operation) in OWN
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

"""Rematerialisation of single layers: what of each is computed again in the backward pass instead of being kept (Chen et al.
2016, section 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from luban.core.plan import Remat

aten = torch.ops.aten
MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.linear.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
OWN = {
    "luban.flash_forward.default",
    "luban.flash4_forward.default",
    "luban.gated_matmuls.default",
    "luban.low_rank_linear.default",
    "luban.tiled_linear.default",
    "luban.apply_rotary_qkv.default",
}  # the last is what attention keeps


class FullRemat:
    """Keeps only what goes into each layer, for one more forward pass.

    Args:
        random: the layers draw numbers (dropout), which must be the same when they run again.
    """

    def __init__(self, random: bool = False) -> None:
        self.options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}

    def run(self, function: Callable[[Tensor, Any], Tensor], x: Tensor, ctx: Any) -> Tensor:
        """function(x, ctx), which forgets."""
        return checkpoint(function, x, ctx, **self.options)


class SelectiveRemat(FullRemat):
    """Keeps matmuls and attention; norms, rotations and activations are computed again: most of the memory for almost no
    time, as those are bound by the reading that the backward pass does anyhow."""

    def __init__(self, random: bool = False) -> None:
        super().__init__(random)
        self.options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_matmuls)
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_the_usual_warning)


POLICIES: dict[Remat, type[FullRemat]] = {"selective": SelectiveRemat, "full": FullRemat}


def remat_policy(what: Remat, block: nn.Module) -> FullRemat | None:
    """The policy of this name for a layer; None: nothing is computed again."""
    random = any(isinstance(part, nn.Dropout) for part in block.modules())
    return POLICIES[what](random) if what in POLICIES else None


def _keep_matmuls(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operation in MATMULS or str(operation) in OWN
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _not_the_usual_warning(record: logging.LogRecord) -> bool:
    """Compiling a selective policy warns of in-place operations inside of blocks, which have none."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()

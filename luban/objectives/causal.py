"""Causal language modelling: the cross-entropy of every trained next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luban.core.errors import ConfigError
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.kernels.available import triton_runs
from luban.kernels.limits import CHUNK_ELEMENTS, IGNORED
from luban.objectives.family import Objective

WORTH = 0.75  # share of trained rows up to which they are picked out: every new shape costs time and memory


@dataclass(frozen=True, kw_only=True)
class Causal(Objective):
    """The next token from those before it; of conversations only what their mask trains."""

    bodies = ("decoder", "recurrent")
    heads = ("language_model",)
    reads_whole_text = True
    smoothing: float = 0.0  # share of every target spread evenly over the vocabulary (Szegedy et al. 2016, section 7)
    z_loss: float = 0.0  # factor on log²Z, which keeps logits from drifting (Chowdhery et al. 2022, section 5)

    def __post_init__(self):
        if not 0 <= self.smoothing < 1 or not 0 <= self.z_loss < float("inf"):
            raise ConfigError(f"smoothing is a share below 1 and z_loss a factor from 0 on: {self.smoothing} and "
                              f"{self.z_loss} given")  # fmt: skip

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows as they are."""
        return PACKINGS[packing](shards, seq_len)

    def measured(self) -> Causal:
        """Bare cross-entropy."""
        return Causal()

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the trained targets."""
        return causal_loss(module, *arrays, smoothing=self.smoothing, z_loss=self.z_loss)


def causal_loss(module: nn.Module, tokens: Tensor, targets: Tensor, loss_mask: Tensor,
                documents: Tensor | None = None, positions: Tensor | None = None, starts: Tensor | None = None, *,
                smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum of the cross-entropy in nats over trained targets, and how many there are.

    Never a mean, so that accumulation and ranks can divide by all tokens trained.

    Args:
        tokens, targets: (B, T) int64; targets are the tokens that follow.
        loss_mask: (B, T) bool, true where the target is trained on.
        documents, positions: (B, T) as the model takes them.
        starts: (B, C), where documents begin. Kernels of GPUs alone can use it: elsewhere it isn't looked at, since
            another C would only make another graph.
        smoothing, z_loss: as in `kernels.cross_entropy`.

    Returns:
        (loss_sum, count): scalars, float32 (float64 for a float64 model) and int64.
    """
    starts = starts if tokens.is_cuda else None
    hidden = module(tokens, documents=documents, positions=positions, starts=starts, output="hidden")
    return token_cross_entropy(module, hidden, targets, loss_mask, smoothing=smoothing, z_loss=z_loss)


def token_cross_entropy(module: Any, hidden: Tensor, targets: Tensor, loss_mask: Tensor, *, smoothing: float = 0.0,
                        z_loss: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from hidden states (B, T, E) that the module's head turns into logits.

    On CUDA a kernel makes logits and gradients together for a bounded number of rows at once. Elsewhere logits are
    made in float32, also for a bounded number of rows, and made again in the backward pass.
    """
    rows, table, bias = module.vocabulary_product(hidden)
    rows, wanted, trained = rows.flatten(0, -2), targets.flatten(), loss_mask.flatten()
    if triton_runs(rows, table) and rows.dtype == table.dtype != torch.float64:
        from luban.kernels.cross_entropy import linear_cross_entropy

        wanted = torch.where(trained, wanted, IGNORED)
        total = linear_cross_entropy(rows, table, wanted, bias_V=bias, smoothing=smoothing, z_loss=z_loss)
        return total, trained.sum()
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = trained.nonzero().squeeze(-1)  # where shapes are free to vary, untrained rows cost nothing
        if kept.shape[0] <= WORTH * trained.shape[0]:
            rows, wanted, trained = rows[kept], wanted[kept], trained[kept]
    wanted = torch.where(trained, wanted, IGNORED)
    size = max(1, CHUNK_ELEMENTS // table.shape[0])
    if rows.shape[0] <= size:
        total = _cross_entropy_sum(rows, table, bias, wanted, smoothing, z_loss)
    else:
        pieces = [checkpoint(_cross_entropy_sum, r, table, bias, w, smoothing, z_loss, use_reentrant=False)
                  for r, w in zip(rows.split(size), wanted.split(size), strict=True)]  # fmt: skip
        total = torch.stack(pieces).sum()
    return total, trained.sum()


def _cross_entropy_sum(rows: Tensor, table: Tensor, bias: Tensor | None, wanted: Tensor, smoothing: float,
                       z_loss: float) -> Tensor:  # fmt: skip
    logits = F.linear(rows, table, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    if z_loss:
        total = total + z_loss * torch.where(wanted == IGNORED, 0.0, logits.logsumexp(-1)).square().sum()
    return total

"""The output layer of a language model: logits, or their cross-entropy without all of them ever being in memory.

N rows, E width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luban.kernels.available import triton_runs
from luban.kernels.limits import CHUNK_ELEMENTS, IGNORED
from luban.nn.embedding import Embedding
from luban.nn.int8 import Int8Weight, PackedKind
from luban.nn.linear import MatmulOwner, Projection
from luban.nn.precision import at_least_float32

DENSE_ENOUGH = 0.75  # share of trained rows up to which the others are dropped: every new shape costs time and memory


class Vocabulary:
    """What is made of logits: this one has all columns. Tensor parallelism divides them among processes and installs its
    own with `LMHead.use_vocabulary`."""

    def linear_cross_entropy(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, smoothing: float, z_loss: float
    ) -> Tensor | None:
        """The summed cross-entropy of rows (N, E) by a kernel that keeps gradients instead of logits; None: there is none for
        these rows."""
        if not (triton_runs(rows) and rows.dtype == weight.dtype != torch.float64):
            return None
        from luban.kernels.cross_entropy import linear_cross_entropy

        return linear_cross_entropy(rows, weight, wanted, bias_V=bias, smoothing=smoothing, z_loss=z_loss)

    def cross_entropy(self, logits: Tensor, wanted: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """Summed cross-entropy of logits (N, V) and targets (N,), a scalar."""
        total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        if z_loss:
            total = total + z_loss * torch.where(wanted == IGNORED, 0.0, logits.logsumexp(-1)).square().sum()
        return total

    def logprobs(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (N, V) and targets (N,): log-probabilities of the targets (N,), 0 at -100, and entropies (N,)."""
        logprobs = logits.log_softmax(-1)
        picked = logprobs.gather(-1, wanted.clamp_min(0)[:, None]).squeeze(-1)
        return torch.where(wanted == IGNORED, 0.0, picked), -(logprobs.exp() * logprobs).sum(-1)

    def joined(self, logits: Tensor) -> Tensor:
        """Logits (…, V) of the whole vocabulary."""
        return logits


WHOLE = Vocabulary()


class LMHead(Projection, MatmulOwner):
    """hidden·weightᵀ (+ bias), the owner of the weight (V, E); a tied one shares its parameter with the embedding.

    Args:
        tied: the embedding whose weight this is; None: a weight of its own.
        scale: factor on the hidden states (T5: 1/√E where tied).
    """

    def __init__(self, width: int, vocab_size: int, *, bias: bool, tied: Embedding | None = None, scale: float = 1.0):
        super().__init__(width, vocab_size, bias=bias, role="lm_head")
        self.init_matmul()
        self.scale = scale
        self.vocabulary: Vocabulary = WHOLE
        if tied is not None:
            self.weight = tied.weight

    def projections(self) -> Mapping[str, Projection]:
        """Itself, as "weight"."""
        return {"weight": self}

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Let `vocabulary` make the loss of the logits, of which this process computes a part."""
        self.vocabulary = vocabulary

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        reduce: Literal["sum", "none"] = "sum",
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (…, V) of hidden states (…, E); with `targets` their cross-entropy instead.

        On CUDA a kernel computes logits and gradients together for a bounded number of rows at once. Elsewhere logits are
        computed in float32, also for a bounded number of rows, and again in the backward pass.

        Args:
            targets: (…) int64 ids below V; -100 counts nothing.
            reduce: "sum": the summed cross-entropy in nats, a float32 scalar (float64 for a float64 model); "none": (…)
                log-probabilities of the targets (0 at -100), and (…) entropies of the predicted distributions, in nats.
            smoothing: share of every target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
            z_loss: factor on log²Z (Chowdhery et al. 2022, section 5).
        """
        rows = hidden if self.scale == 1.0 else hidden * self.scale
        if targets is None:
            return self.vocabulary.joined(self._logits(rows))
        rows, wanted = rows.flatten(0, -2), targets.flatten()
        if reduce == "none":
            logprobs, entropies = self._by_chunks(self.vocabulary.logprobs, rows, wanted)
            return logprobs.view(targets.shape), entropies.view(targets.shape)
        if self.adapters is None and self.packed is None:
            fused = self.vocabulary.linear_cross_entropy(rows, self.weight, self.bias, wanted, smoothing, z_loss)
            if fused is not None:
                return fused
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            kept = (wanted != IGNORED).nonzero().squeeze(-1)  # where shapes are free to vary, ignored rows cost nothing
            if kept.shape[0] <= DENSE_ENOUGH * wanted.shape[0]:
                rows, wanted = rows[kept], wanted[kept]

        def summed(logits: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
            return (self.vocabulary.cross_entropy(logits, wanted, smoothing, z_loss)[None],)

        return self._by_chunks(summed, rows, wanted)[0].sum()

    def _logits(self, rows: Tensor) -> Tensor:
        y = self.matmul.linear(rows, self.weight, self.bias) if self.packed is None else self.packed["weight"](rows)
        return self.plus_adapter("weight", y, rows)

    def _by_chunks(self, each, rows: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        """`each(logits, targets)`, tensors with one entry a row or one a chunk, over a bounded number of rows at once."""

        def chunk(rows: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
            logits = self._logits(rows)
            return each(at_least_float32(logits), wanted)

        size = max(1, CHUNK_ELEMENTS // self.out_features)
        if rows.shape[0] <= size:
            return chunk(rows, wanted)
        parts = [
            checkpoint(chunk, r, w, use_reentrant=False)
            for r, w in zip(rows.split(size), wanted.split(size), strict=True)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def pack(self, kind: PackedKind = Int8Weight) -> None:
        """Replace the weight by a packed one; a tied embedding keeps its own."""
        self.packed = nn.ModuleDict({"weight": kind(self.weight, self.bias)})
        self.drop_parameters()

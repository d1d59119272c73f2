"""Base config of training objectives, and of loss modules: how documents become batches, and their summed loss.

B batch, T tokens, E model width, C documents per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from luban.core.registry import Registry, Variant
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.kernels.limits import IGNORED
from luban.nn.attention.backend import AttentionBackend
from luban.nn.context import RouterTraining

# The arrays of a `luban.data.batch.Batch`: tokens, targets (B, T) int64; loss_mask (B, T) bool; documents, positions (B, T)
# int32; document_starts (B, C) int32. Objectives' batches have further ones, all with the rows first.
TensorBatch = Mapping[str, Tensor]


class LossOutput(NamedTuple):
    """Summed loss of a batch, with metrics. (A tuple, so FSDP finds the tensors.)"""

    sum: Tensor  # (): the loss summed over the batch's targets, in nats, float32 (float64 for float64 models)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012  # name → (sum, count), for logs


class LossModule(nn.Module):
    """The module that is trained: a model with its loss.

    Args:
        model: its forward returns hidden states (`output="hidden"`), its `head` logits or their cross-entropy.
        attention: how the model computes attention; None: the fastest kernel that supports the case.
    """

    model: Any  # a `luban.models.base.Model`, which this package may not import: models stand beside objectives

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None):
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        raise NotImplementedError

    def hidden(self, batch: TensorBatch, **given: Any) -> Tensor:
        """Hidden states (B, T, E) of a one-sided model over packed rows. A batch without `documents` and `positions` has one
        document per row.

        Args:
            given: further arguments of the model's forward.
        """
        tokens = batch["tokens"]
        # Only GPU kernels read it; elsewhere its varying length would only cause recompilation.
        starts = batch["document_starts"] if tokens.is_cuda and "document_starts" in batch else None
        return self.model(
            tokens,
            documents=batch.get("documents"),
            positions=batch.get("positions"),
            document_starts=starts,
            attention=self.attention,
            routing=router_training(batch),
            output="hidden",
            **given,
        )


def router_training(batch: TensorBatch) -> RouterTraining | None:
    """What the routers of a mixture of experts need; None where the trainer asks for no auxiliary losses (held-out batches).

    Args:
        batch: with `router_weights` (B,) and, if a router draws at random, `router_noise` (B, T).
    """
    if "router_weights" not in batch:
        return None
    valid = batch["documents"] >= 0 if "documents" in batch else None
    return RouterTraining(batch["router_weights"], valid, batch.get("router_noise"))


def ignore_untrained(targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Targets (B, T) with −100 where the mask (B, T) is false."""
    return torch.where(loss_mask, targets, IGNORED)


@dataclass(frozen=True, kw_only=True)
class Objective(Variant):
    """Base config of training objectives (registry `objective`)."""

    registry: ClassVar[Registry] = Registry(
        "objective",
        {
            "causal": "luban.objectives.causal:Causal",
            "masked": "luban.objectives.masked:Masked",
            "prefix": "luban.objectives.prefix:PrefixLM",
            "blank_infilling": "luban.objectives.blank:BlankInfilling",
            "denoising": "luban.objectives.denoising:Denoising",
            "span_corruption": "luban.objectives.span:SpanCorruption",
            "bidirectional": "luban.objectives.bidirectional:Bidirectional",
            "auxiliary": "luban.objectives.auxiliary:Auxiliary",
            "labelled": "luban.objectives.labelled:Labelled",
            "ranking": "luban.objectives.ranking:Ranking",
            "preference": "luban.objectives.preference:Preference",
            "policy": "luban.objectives.policy:Policy",
            "value": "luban.objectives.value:ValueFunction",
            "text_to_text": "luban.objectives.text_to_text:TextToText",
            "multitask": "luban.objectives.multitask:Multitask",
        },
    )
    bodies: ClassVar[tuple[str, ...]]  # registered names of the supported bodies
    heads: ClassVar[tuple[str, ...]]  # … and of the supported heads
    shown: ClassVar[tuple[str, ...]] = ("loss",)  # what the progress line shows of a step and of the last validation
    # each token is predicted exactly once from its left context, so bits per byte is defined
    reads_whole_text: ClassVar[bool] = False
    two_positions: ClassVar[bool] = False  # batches have two positions per token, (B, 2, T)
    varies_rows: ClassVar[bool] = (
        False  # the number of rows that go through the model at once differs between micro-batches
    )

    def told(self, figures: Mapping[str, float]) -> str:
        """What the progress line shows of a step's figures and those of the last validation."""
        return "  ".join(f"{name} {figures[name]:.3f}" for name in self.shown if name in figures)

    def extra_ids(self) -> int:
        """Number of ids needed beyond the tokenizer's."""
        return 0

    def decoder_start(self, shards: Shards) -> int | None:
        """Id of the token that an encoder–decoder's targets begin with; None for other models."""
        return None

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """Raise ConfigError if a model with a supported body and head lacks something else that the objective needs.

        Args:
            head: the head's settings.
            causal: the body's attention is causal.
            tied: the lm_head weight is the embedding's.
        """

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """The rows into which this objective's collator packs a split.

        Args:
            seq_len: longest row in tokens, T.
            seed: of all random choices.
            packing: how documents are packed into rows; ignored by objectives that fix the packing.

        Raises:
            DataError: the split or its vocabulary lacks special tokens or documents that the objective needs.
        """
        raise NotImplementedError

    def further_data(self) -> dict[str, str]:
        """Paths of shards that `examples` reads beside its own, by what they are for."""
        return {}

    def tasks_of(self, rows: Packing) -> Mapping[str, tuple[float, Packing]]:
        """Share and rows of each of several tasks that are measured apart; empty for one.

        Args:
            rows: what `examples` gave.
        """
        return {}

    def measured(self) -> Objective:
        """The objective used for validation: this one without regularisers (label smoothing, z-loss)."""
        return self

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The module that is trained."""
        raise NotImplementedError

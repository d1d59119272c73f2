"""The family of objectives: how documents become batches, and the module whose forward gives their summed loss."""

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

TensorBatch = Mapping[str, Tensor]  # a `Batch`'s arrays by name, rows first


class LossOutput(NamedTuple):
    """What a loss module makes of a batch. (A tuple, so that FSDP finds the tensors.)"""

    sum: Tensor  # (): the loss summed over the batch's targets, in nats, float32 (float64 for float64 models)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}  # noqa: RUF012  # name → (sum, count), for logs


class LossModule(nn.Module):
    """What is trained: a model and the loss on top of it.

    Args:
        model: its forward gives hidden states (`output="hidden"`), its `head` logits or their cross-entropy.
        attention: how the model computes attention; None: by the fastest kernel that can serve.
    """

    model: Any  # a `luban.models.base.Model`, which this package may not import: models stand beside objectives

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None):
        super().__init__()
        self.model, self.attention = model, attention

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        raise NotImplementedError

    def hidden(self, batch: TensorBatch, **given: Any) -> Tensor:
        """(B, T, E) hidden states of a one-sided model over packed rows. A batch without `documents` and `positions` has
        one document a row."""
        tokens = batch["tokens"]
        # Only kernels of GPUs use the list of documents: elsewhere another length of it would only make another graph.
        starts = batch["document_starts"] if tokens.is_cuda and "document_starts" in batch else None
        return self.model(
            tokens,
            documents=batch.get("documents"),
            positions=batch.get("positions"),
            document_starts=starts,
            attention=self.attention,
            output="hidden",
            **given,
        )


def ignore_untrained(targets: Tensor, loss_mask: Tensor) -> Tensor:
    """Targets (B, T) with −100 where the mask (B, T) is false."""
    return torch.where(loss_mask, targets, IGNORED)


@dataclass(frozen=True, kw_only=True)
class Objective(Variant):
    """A family of training objectives."""

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
        },
    )
    bodies: ClassVar[tuple[str, ...]]  # registered names of the bodies that it can train
    heads: ClassVar[tuple[str, ...]]  # … and of the heads
    # every token is predicted once from those before: bits per byte mean something
    reads_whole_text: ClassVar[bool] = False
    two_positions: ClassVar[bool] = False  # its batches have two positions a token, (B, 2, T)

    def extra_ids(self) -> int:
        """Ids that it needs beyond the tokenizer's."""
        return 0

    def decoder_start(self, shards: Shards) -> int | None:
        """Id of the token that an encoder–decoder's answers begin with; None: it has no such model."""
        return None

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """Raise ConfigError where a model whose body and head are of the right kind lacks what this objective needs.

        Args:
            head: the head's settings.
            causal: whether the body sees earlier tokens only.
            tied: whether the output layer's weight is the embedding's.
        """

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """The rows that this objective makes of a split, by its collator.

        Args:
            seq_len: longest row in tokens, T.
            seed: of everything that is drawn.
            packing: how documents are laid into rows, for the objectives that leave it open.

        Raises:
            DataError: the split or its vocabulary hasn't what the objective needs.
        """
        raise NotImplementedError

    def measured(self) -> Objective:
        """What held-out text is measured by: itself, without what training adds to its loss."""
        return self

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The module that is trained."""
        raise NotImplementedError

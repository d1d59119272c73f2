"""Reward modelling: the score of an answer read off its last token, answers of one prompt ranked against each other.

B groups, T tokens a row, K answers, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.data.collate.preference import PreferenceRows, require_answers
from luban.data.groups import Groups
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.nn.precision import at_least_float32
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained
from luban.objectives.ranking_losses import Margin, margins_of, ranking_accuracy, ranking_loss


@dataclass(frozen=True, kw_only=True)
class Ranking(Objective):
    """Answers ranked by one number each (a model with a value head)."""

    margin: Margin = "none"  # by which grades must be told apart: none, or Llama 2's small or large table
    center: float = 0.0  # factor on the mean squared score, which keeps scores near 0 (Eisenstein et al. 2023)
    # factor on −log π a token of the best answers: one model that ranks and writes (a tied decoder)
    language: float = 0.0

    bodies = ("decoder", "encoder")
    heads = ("value",)
    shown = ("loss", "accuracy", "heldout_accuracy")

    def __post_init__(self):
        if not (0 <= self.center < float("inf") and 0 <= self.language < float("inf")):
            raise ConfigError(f"center and language are factors from 0 on, {self.center} and {self.language} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """A value head that reads the last token of a decoder, or any one of an encoder."""
        if getattr(head, "pooling", "last") != "last":
            raise ConfigError('a reward is read off the last token: set model.head.pooling = "last"')
        if self.language and not (causal and tied):
            raise ConfigError(
                "a model that ranks and writes needs a decoder whose output layer is the embedding: set objective.language = 0, "
                "or train a decoder with model.tied_head = true"
            )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """A group a row."""
        return PreferenceRows(shards, seq_len, least=2)

    def require_data(self, shards: Shards) -> None:
        """Raise DataError for shards whose preferences can't be ranked, or that have no grades where margins are asked for."""
        groups = Groups.open(shards)
        require_answers(groups, f"shards {shards.path}", least=2, most=None)
        if self.margin != "none" and not (groups.grades >= 0).any():
            raise DataError(
                f"objective.margin {self.margin} reads grades, and no row of shards {shards.path} has one: add `grade` (0, "
                f"significantly better, to 3, negligibly) to the rows, or leave objective.margin out"
            )

    def measured(self) -> Ranking:
        """The ranking loss alone."""
        return Ranking()

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Sum over groups of their mean pairwise loss."""
        return RankingLoss(model, attention, margin=self.margin, center=self.center, language=self.language)


class RankingLoss(LossModule):
    """Summed ranking loss of the groups; metrics: accuracy over pairs, mean score and its square."""

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionBackend | None = None,
        *,
        margin: Margin = "none",
        center: float = 0.0,
        language: float = 0.0,
    ):
        super().__init__(model, attention)
        self.center, self.language = center, language
        self.margin: Margin = margin

    def scores(self, batch: TensorBatch, hidden_BTE: Tensor | None = None) -> Tensor:
        """(B, K) float32 scores; those of absent answers mean nothing."""
        hidden_BTE = self.hidden(batch) if hidden_BTE is None else hidden_BTE
        ends_BK = batch["ends"]
        index = ends_BK[..., None].expand(-1, -1, hidden_BTE.shape[-1])
        states = hidden_BTE.gather(1, index).flatten(0, 1)
        return at_least_float32(self.model.head(states[:, None])).view(ends_BK.shape)

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        hidden_BTE = self.hidden(batch)
        scores, ranks, present = self.scores(batch, hidden_BTE), batch["ranks"], batch["present"]
        margins = margins_of(batch["grades"], self.margin).to(scores.dtype)
        loss_B = ranking_loss(scores, ranks, present, margins, batch["probabilities"].to(scores.dtype))
        right, count = ranking_accuracy(scores.detach(), ranks, present)
        shown = torch.where(present, scores, 0.0)
        if self.center:
            loss_B = loss_B + self.center * shown.square().sum(-1) / present.sum(-1).clamp_min(1)
        metrics = {
            "accuracy": (right, count),
            "score": (shown.detach().sum(), present.sum()),
            "score_squared": (shown.detach().square().sum(), present.sum()),
        }
        if self.language:
            trained = batch["loss_mask"] & (batch["documents"] == 0)
            logprobs, _ = self.model.head.language_model(
                hidden_BTE, ignore_untrained(batch["targets"], trained), reduce="none"
            )
            language_B = -logprobs.sum(-1) / trained.sum(-1).clamp_min(1)
            loss_B = loss_B + self.language * language_B
            metrics["language_loss"] = (language_B.detach().sum(), present.any(-1).sum())
        return LossOutput(loss_B.sum(), metrics)

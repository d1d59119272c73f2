"""Training a language model on preferences: log-probabilities of answers into a preference loss.

B groups, T tokens a row, K answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.data.collate.preference import PreferenceRows, require_answers
from luban.data.groups import Groups
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained
from luban.objectives.preference_losses import DPO, AnswerLogprobs, PreferenceLoss
from luban.objectives.ranking_losses import ranking_accuracy


@dataclass(frozen=True, kw_only=True)
class Preference(Objective):
    """Answers that are preferred made likelier than others (DPO and its kin)."""

    method: PreferenceLoss = field(default_factory=DPO)  # which loss
    sft: float = (
        0.0  # factor on −mean log-probability a token of the first answer where it is wanted, added to the loss
    )

    bodies = ("decoder",)
    heads = ("language_model",)
    shown = ("loss", "accuracy", "reward_margin", "heldout_accuracy", "heldout_reward_margin")

    def __post_init__(self):
        if not 0 <= self.sft < float("inf"):
            raise ConfigError(f"objective.sft is a factor from 0 on, {self.sft} given")

    def require_data(self, shards: Shards) -> None:
        """Raise DataError for shards whose preferences the loss can't be trained on."""
        groups, (least, most) = Groups.open(shards), self._answers
        require_answers(groups, f"shards {shards.path}", least=least, most=most)
        if not self.method.soft and (soft := int((groups.probabilities != 1).sum())):
            raise DataError(
                f"shards {shards.path} hold {soft} soft labels (`probability`), which this loss doesn't read: leave the column "
                f"out, or train by objective.method.type dpo, ipo, hinge, orpo or simpo"
            )

    @property
    def _answers(self) -> tuple[int, int | None]:
        """Answers that a prompt has at least, and at most."""
        return (2, 2) if self.method.paired else (1, None)

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """A group a row."""
        least, most = self._answers
        return PreferenceRows(shards, seq_len, least=least, most=most, mismatches=self.method.mismatches)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Sum over groups."""
        return PreferenceLossModule(model, attention, self.method, self.sft)


class AnswerLossModule(LossModule):
    """A loss module that computes log-probabilities of answers."""

    def answer_logprobs(self, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        """(B, K + 1) summed log-probabilities of the answers, and their numbers of tokens; in the last column those of the
        mismatched answer, 0 where there is none."""
        targets = ignore_untrained(batch["targets"], batch["loss_mask"])
        logprobs_BT, _ = self.model.head(self.hidden(batch), targets, reduce="none")
        columns = batch["ends"].shape[1] + 1
        index = batch["documents"].clamp_min(0).long()
        found = logprobs_BT.new_zeros(len(index), columns).scatter_add(1, index, logprobs_BT)
        lengths = logprobs_BT.new_zeros(len(index), columns)
        return found, lengths.scatter_add(1, index, batch["loss_mask"].to(lengths.dtype))

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed log-probability of all answers, which nothing is trained by: for reference models."""
        return LossOutput(self.answer_logprobs(batch)[0].sum())


class PreferenceLossModule(AnswerLossModule):
    """Summed preference loss of the groups."""

    def __init__(self, model: nn.Module, attention: AttentionBackend | None, loss: PreferenceLoss, sft: float):
        super().__init__(model, attention)
        self.loss, self.sft = loss, sft

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch. Metrics of losses with a reference: the implicit reward's accuracy and margin."""
        logprobs, lengths = self.answer_logprobs(batch)
        present = batch["present"]
        answers = AnswerLogprobs(
            policy=logprobs[:, :-1],
            reference=torch.where(present, batch["reference"].to(logprobs.dtype), 0.0),
            lengths=lengths[:, :-1],
            ranks=batch["ranks"],
            probabilities=batch["probabilities"].to(logprobs.dtype),
            mismatched=(logprobs[:, -1] - batch["mismatched_reference"].to(logprobs.dtype)).detach(),
        )
        real_B = present.any(-1)
        loss_B = torch.where(real_B, self.loss(answers), 0.0)
        if self.sft:
            unwanted_B = (present.sum(-1) < 2) & (
                batch["ranks"][:, 0] < 0.5
            )  # a lone answer that is labelled as a bad one
            loss_B = loss_B - self.sft * torch.where(real_B & ~unwanted_B, answers.means[:, 0], 0.0)
        with torch.no_grad():
            rewards = answers.ratios if self.loss.needs_reference else answers.means
            metrics = {
                "accuracy": ranking_accuracy(torch.where(present, rewards, 0.0), batch["ranks"], present),
                "chosen_logprob": (torch.where(real_B, answers.means[:, 0], 0.0).sum(), real_B.sum()),
            }
            if self.loss.paired:
                margin = torch.where(real_B, rewards[:, 0] - rewards[:, 1], 0.0)
                metrics["reward_margin"] = (margin.sum(), real_B.sum())
        return LossOutput(loss_B.sum(), metrics)

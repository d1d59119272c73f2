"""Policy gradients: log-probabilities of sampled tokens into a clipped loss, with KL, entropy bonus and pretraining mix.

B answers, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.data.collate.rollout import LOGGED, RolloutRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained
from luban.objectives.policy_losses import clipped_policy_loss, k3


@dataclass(frozen=True, kw_only=True)
class Policy(Objective):
    """Sampled answers made likelier or less likely by their advantages."""

    clip: float = 0.2  # ratio to the sampling policy below 1 − clip counts no further
    clip_high: float = 0.0  # … and above 1 + clip_high (0: as clip)
    kl_weight: float = 0.0  # factor on the KL estimate in the loss (GRPO)
    entropy_weight: float = 0.0  # factor on the mean entropy, which is made larger
    temperature: float = 1.0  # that tokens were sampled at

    bodies = ("decoder",)
    heads = ("language_model",)
    shown = ("reward", "kl", "heldout_reward")

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"objective.{name} must be a number from 0 on, {value} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """A temperature divides hidden states, so that the head may have no bias."""
        if self.temperature != 1 and getattr(head, "bias", False):
            raise ConfigError("a head with a bias can only be trained at rl.temperature 1")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Rows of the right shape."""
        return RolloutRows(shards, seq_len)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The clipped loss."""
        return PolicyLoss(model, attention, self)


class TokenLogprobs(LossModule):
    """A loss module that computes log-probabilities of sampled tokens."""

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None, temperature: float = 1.0):
        super().__init__(model, attention)
        self.temperature = temperature

    def logprobs(self, batch: TensorBatch) -> tuple[Tensor, Tensor]:
        """(B, T) log-probabilities of the targets at the sampling temperature, 0 outside of the loss mask, and entropies."""
        hidden = self.hidden(batch)
        hidden = hidden if self.temperature == 1 else hidden / self.temperature
        return self.model.head(hidden, ignore_untrained(batch["targets"], batch["loss_mask"]), reduce="none")

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed log-probability, which nothing is trained by: for reference models."""
        return LossOutput(self.logprobs(batch)[0].sum())


class PolicyLoss(TokenLogprobs):
    """Sum over tokens of `weights` times the clipped loss. Metrics: entropy, clipped share, ratio extremes, what is logged."""

    def __init__(self, model: nn.Module, attention: AttentionBackend | None, config: Policy):
        super().__init__(model, attention, config.temperature)
        self.config = config

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        config, mask, weights = self.config, batch["loss_mask"], batch["weights"]
        logprobs, entropies = self.logprobs(batch)
        ratio = torch.where(mask, logprobs - batch["old_logprobs"], 0.0).exp()
        low, high = config.clip, config.clip_high or config.clip
        loss = clipped_policy_loss(ratio, batch["advantages"], low, high)
        if config.kl_weight:
            loss = loss + config.kl_weight * k3(logprobs, batch["reference_logprobs"])
        if config.entropy_weight:
            loss = loss - config.entropy_weight * entropies
        total = torch.where(mask, weights * loss, 0.0).sum()
        if "pretrain_tokens" in batch:
            total = total + self.pretraining(batch)
        return LossOutput(total, self.metrics(batch, ratio.detach(), entropies.detach(), low, high))

    def pretraining(self, batch: TensorBatch) -> Tensor:
        """InstructGPT's pretraining mix: cross-entropy of text, times the weight that its rows carry."""
        text = {name.removeprefix("pretrain_"): t for name, t in batch.items() if name.startswith("pretrain_")}
        targets = ignore_untrained(text["targets"], text["loss_mask"])
        return text["weight"][0] * self.model.head(self.hidden(text), targets)

    def metrics(
        self, batch: TensorBatch, ratio: Tensor, entropies: Tensor, low: float, high: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Means over tokens, and over answers of what is logged."""
        mask = batch["loss_mask"]
        tokens, rows = mask.sum(), mask.any(-1).sum()
        outside = ((ratio < 1 - low) | (ratio > 1 + high)) & mask
        found = {
            "entropy": (torch.where(mask, entropies, 0.0).sum(), tokens),
            "clipped_share": (outside.sum(), tokens),
            "ratio": (torch.where(mask, ratio, 0.0).sum(), tokens),
            "ratio_max": (torch.where(mask, ratio, 0.0).amax(), torch.ones_like(tokens)),
            "ratio_min": (torch.where(mask, ratio, torch.inf).amin().nan_to_num(posinf=1.0), torch.ones_like(tokens)),
        }
        logged = {name.removeprefix(LOGGED): value for name, value in batch.items() if name.startswith(LOGGED)}
        return found | {name: (value.sum(), rows) for name, value in logged.items()}

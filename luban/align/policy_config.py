"""Ways of learning from scored answers: PPO, RLOO, GRPO, Quark (registry `rl`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from luban.align.advantages import gae, group_relative, leave_one_out, token_rewards, whiten
from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.objectives.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A round's answers. N answers, those of one prompt next to each other; T tokens."""

    scores: np.ndarray  # (N,) float64
    mask: np.ndarray  # (N, T) bool, true where the target is a token of the answer
    kl: np.ndarray  # (N, T) log π − log π_ref of the sampled tokens, 0 outside of the mask
    values: np.ndarray  # (N, T) of the critic, 0 without one
    beta: float  # KL coefficient of the round


@dataclass(frozen=True, kw_only=True)
class RL(Variant):
    """Base config of policy gradients (registry `rl`)."""

    registry: ClassVar[Registry] = Registry(
        "rl",
        {
            "ppo": "luban.align.policy_config:PPO",
            "rloo": "luban.align.policy_config:RLOO",
            "grpo": "luban.align.policy_config:GRPO",
            "quark": "luban.align.policy_config:Quark",
        },
    )
    has_critic: ClassVar[bool] = False
    grouped: ClassVar[bool] = True  # several answers to a prompt are compared
    kl_in_loss: ClassVar[bool] = False  # the KL estimate k3 is part of the loss, not of the rewards
    quantiles: ClassVar[int] = 0  # of scores that prompts ask for; 0: prompts are what they are

    prompts: int = 8  # of a round
    samples: int = 8  # answers to each prompt
    epochs: int = 1  # passes over a round's answers
    max_tokens: int = 64  # of an answer
    temperature: float = 1.0  # of sampling, and of the log-probabilities
    kl: float = 0.05  # coefficient on the KL divergence from the reference
    kl_target: float = 0.0  # adapt the coefficient so that the KL of an answer is this, in nats (0: fixed)
    kl_horizon: float = 10000.0  # answers over which it adapts
    clip: float = 0.2  # clipping range of the ratio to the sampling policy
    clip_high: float = 0.0  # … above 1 (0: as clip)
    entropy: float = 0.0  # factor on an entropy bonus
    importance_cap: float = 0.0  # weigh tokens by min(π_trainer / π_engine, this) (0: off)
    unfinished: float | None = None  # score of an answer that max_tokens cut off (none: as the reward scores it)
    max_kl: float = 0.0  # stop where the KL of an answer exceeds this, in nats (0: never)
    min_entropy: float = 0.0  # stop where the mean entropy of a token is below this, in nats (0: never)
    heldout: int = 64  # prompts, at most, on which the held-out reward is measured
    reward_timeout: float = 10.0  # seconds that a function, a test or an endpoint has for one answer
    pretrain: str = ""  # shards of text that are trained on beside (empty: none)
    pretrain_weight: float = 0.0  # γ, factor on their mean cross-entropy, where the policy's mean loss has 1

    def __post_init__(self):
        for name in ("prompts", "samples", "epochs", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rl.{name} must be at least 1, {getattr(self, name)} given")
        if not self.temperature > 0:
            raise ConfigError(f"rl.temperature must be above 0, {self.temperature} given")
        if self.grouped and self.samples < 2:
            name = RL.registry.name_of(type(self))
            raise ConfigError(f"rl.type {name} compares the answers to a prompt: rl.samples must be at least 2")
        for name in ("kl", "kl_target", "importance_cap", "max_kl", "min_entropy", "pretrain_weight", "entropy"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rl.{name} must be at least 0, {getattr(self, name)} given")
        if self.kl_target and not self.kl:
            raise ConfigError("rl.kl_target adapts the coefficient rl.kl, which must be above 0 then")
        if bool(self.pretrain) != bool(self.pretrain_weight):
            raise ConfigError("rl.pretrain (shards) and rl.pretrain_weight (γ) go together: give both or none")

    @property
    def answers(self) -> int:
        """Answers a round."""
        return self.prompts * self.samples

    @property
    def measures_kl(self) -> bool:
        """Whether there is a reference model, from which the divergence is measured."""
        return bool(self.kl or self.max_kl)

    def objective(self) -> Policy:
        """The policy's loss."""
        return Policy(
            clip=self.clip,
            clip_high=self.clip_high,
            entropy_weight=self.entropy,
            temperature=self.temperature,
            kl_weight=self.kl if self.kl_in_loss else 0.0,
        )

    def advantages(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """(advantages, returns), (N, T) each; returns are what a critic learns, 0 without one."""
        raise NotImplementedError

    def token_weights(self, mask: np.ndarray) -> np.ndarray:
        """(N, T) weights of the tokens' losses. Here every token counts the same."""
        return mask.astype(np.float64)

    def divisor(self, weights: np.ndarray) -> float:
        """What a step over tokens of these weights (B, T) divides its sum by: theirs."""
        return float(weights.sum())


@dataclass(frozen=True, kw_only=True)
class PPO(RL):
    """Proximal policy optimisation with a critic and a KL penalty at every token (InstructGPT, AlpacaFarm)."""

    has_critic = True
    grouped = False
    samples: int = 1  # answers to each prompt
    prompts: int = 64  # of a round
    epochs: int = 2  # passes over a round's answers
    gamma: float = 1.0  # discount
    lam: float = 0.95  # λ of generalised advantage estimation
    value_clip: float = 0.2  # by which a value may move in a round
    whiten_rewards: bool = False  # divide rewards by their standard deviation
    critic: str = ""  # MODEL that the critic starts from (empty: the first reward model, else the policy's body)
    critic_lr: float = 0.0  # peak learning rate of the critic (0: the policy's)

    def advantages(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """GAE over token rewards, whitened over the mask."""
        rewards = token_rewards(scored.scores, scored.kl, scored.mask, scored.beta)
        if self.whiten_rewards:
            rewards = whiten(rewards, scored.mask, shift_mean=False)
        advantages, returns = gae(rewards, scored.values, scored.mask, self.gamma, self.lam)
        return whiten(advantages, scored.mask), returns


@dataclass(frozen=True, kw_only=True)
class RLOO(RL):
    """REINFORCE with a leave-one-out baseline, the KL penalty in the score of the whole answer."""

    def advantages(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """An answer's penalised score less the mean of the prompt's others, the same at every token."""
        penalised = scored.scores - scored.beta * np.where(scored.mask, scored.kl, 0.0).sum(-1)
        found = leave_one_out(penalised.reshape(-1, self.samples)).reshape(-1, 1)
        return np.where(scored.mask, found, 0.0), np.zeros(scored.mask.shape)


@dataclass(frozen=True, kw_only=True)
class GRPO(RL):
    """Group-relative policy optimisation, the KL estimate in the loss."""

    kl_in_loss = True
    scale: bool = True  # divide by the standard deviation of the prompt's scores (false: Dr. GRPO)
    normalise: Literal["answer", "token", "constant"] = (
        "answer"  # mean over answers of means over tokens; over tokens; / max_tokens
    )

    def advantages(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """Scores relative to the prompt's group, the same at every token."""
        found = group_relative(scored.scores.reshape(-1, self.samples), scale=self.scale).reshape(-1, 1)
        return np.where(scored.mask, found, 0.0), np.zeros(scored.mask.shape)

    def token_weights(self, mask: np.ndarray) -> np.ndarray:
        """ "answer" (Shao et al. 2024): 1 / length; "token" (Yu et al. 2025, DAPO): 1; "constant" (Liu et al. 2025, Dr. GRPO):
        1 / max_tokens, the step divided by the number of answers."""
        if self.normalise == "token":
            return mask.astype(np.float64)
        lengths = mask.sum(-1, keepdims=True) if self.normalise == "answer" else self.max_tokens
        return mask / np.maximum(lengths, 1)

    def divisor(self, weights: np.ndarray) -> float:
        """The sum of the weights; with "constant" the number of answers, however long they are."""
        return float(len(weights)) if self.normalise == "constant" else super().divisor(weights)

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target:
            raise ConfigError("GRPO's KL is part of the loss with a fixed coefficient: leave rl.kl_target out")


@dataclass(frozen=True, kw_only=True)
class Quark(RL):
    """Imitation of the model's own answers, each behind a sentence that says in which quantile of the scores it is (Lu et al. 2022,
    "Quark"; `luban.align.feedback.conditioned_prompt`). Answers are written behind the sentence of the highest one.

    Borders are quantiles over the scores of the rounds that are kept and of this one. The KL estimate is part of the loss. Departure
    from the paper: each round is trained on once, older answers count for the borders only, and the reference reads the sentence.
    """

    grouped = False
    kl_in_loss = True
    quantiles = 5
    prompts: int = 64  # of a round
    samples: int = 1  # answers to each prompt
    entropy: float = 0.06  # factor on an entropy bonus

    def advantages(self, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
        """1 at every token: at the policy that the round began with, the loss has the gradient of a negative log-likelihood."""
        return scored.mask.astype(np.float64), np.zeros(scored.mask.shape)

    def __post_init__(self):
        super().__post_init__()
        if self.kl_target:
            raise ConfigError("Quark's KL is part of the loss with a fixed coefficient: leave rl.kl_target out")
        if self.importance_cap:
            raise ConfigError(
                "Quark trains answers behind another prompt than they were written behind: leave rl.importance_cap out"
            )

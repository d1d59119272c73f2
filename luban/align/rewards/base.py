"""Rewards by name, several of them with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import ConfigError, TrainingError, UsageError
from luban.core.hashing import data_sha256, file_sha256
from luban.tokenizer.tokenizer import Tokenizer

NAMES = (
    "RM (a run of luban reward), guarded:SAFETY:HELPFULNESS (two of them), judge:MODEL, file.py:function, gsm8k, "
    "facts[:PENALTY], regex:PATTERN, unit_tests or an http address"
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a policy has written."""

    row: dict[str, Any]  # of the file of prompts
    text: str
    prompt_ids: list[int]
    ids: list[int]  # as generated, the end token included


class Reward(Protocol):
    """Scores answers."""

    name: str  # for logs: reward_NAME

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer."""
        ...


@dataclass(frozen=True)
class Rewards:
    """Several rewards, summed with weights."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    def scores(self, answers: Sequence[Answer]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """((N,) weighted sums, name → (N,) scores of each).

        Raises:
            TrainingError: a reward that isn't a finite number; names the reward and the prompt.
        """
        apart: dict[str, np.ndarray] = {}
        for reward in self.rewards:
            scores = reward.scores(answers)
            for answer, score in zip(answers, scores, strict=True):
                if not isinstance(score, (int, float)) or not math.isfinite(score):
                    raise TrainingError(
                        f"reward {reward.name} gave {score!r} for the answer {answer.text[:80]!r}: it must be a finite "
                        f"number. The step was not applied"
                    )
            apart[reward.name] = np.array(scores, dtype=np.float64)
        return sum(w * s for w, s in zip(self.weights, apart.values(), strict=True)), apart  # type: ignore[return-value]


def open_rewards(
    names: Sequence[str], weights: Sequence[float], tokenizer: Tokenizer, owner: str, device: str, timeout: float
) -> Rewards:
    """The rewards of a recipe.

    Args:
        names: see `NAMES`.
        tokenizer, owner: of the policy, which reward models must share; what it is called.
        timeout: seconds that a function, a test or an endpoint has for one answer.

    Raises:
        UsageError: no reward, or a name that means nothing.
        LineageError: a reward model with another vocabulary or chat template.
    """
    if not names:
        raise UsageError(f"no reward: give --reward {NAMES}")
    if weights and len(weights) != len(names):
        raise ConfigError(f"{len(names)} rewards need as many reward_weights, {len(weights)} given")
    made = tuple(_open(name, tokenizer, owner, device, timeout) for name in names)
    if len({reward.name for reward in made}) < len(made):
        raise ConfigError(f"two rewards have the same name, {', '.join(reward.name for reward in made)}: rename one")
    return Rewards(made, tuple(weights) or (1.0,) * len(made))


def _open(name: str, tokenizer: Tokenizer, owner: str, device: str, timeout: float) -> Reward:
    from luban.align.rewards.endpoint import Endpoint
    from luban.align.rewards.function import FunctionReward
    from luban.align.rewards.guarded import GuardedReward, split_name
    from luban.align.rewards.judge import JudgeReward
    from luban.align.rewards.model import ModelReward
    from luban.align.rewards.verifiers import GSM8K, Facts, Pattern, UnitTests

    if name == "gsm8k":
        return GSM8K()
    if name == "unit_tests":
        return UnitTests(timeout)
    if name == "facts" or name.startswith("facts:"):
        return Facts(name.partition(":")[2] or "1")
    if name.startswith("regex:"):
        return Pattern(name.removeprefix("regex:"))
    if name.startswith(("http://", "https://")):
        return Endpoint(name, timeout)
    if name.startswith("judge:"):
        return JudgeReward.open(name, device, timeout)
    if name.startswith("guarded:"):
        safety, helpfulness, least = split_name(name)
        models = (_open(each, tokenizer, owner, device, timeout) for each in (safety, helpfulness))
        return GuardedReward(*models, least)  # type: ignore[arg-type]
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return FunctionReward(Path(file), function, timeout)
    if not Path(name).exists():
        raise UsageError(f"there is no reward '{name}': give --reward {NAMES}")
    return ModelReward(name, tokenizer, owner, device)


def identity(name: str) -> str:
    """What a reward or a reference is known by in a run's configuration, so that a run isn't resumed with another: the hash of
    a model or of a function's file, else its name."""
    if name.startswith("guarded:"):
        return ":".join(["guarded", *map(identity, name.split(":")[1:])])
    if name.startswith("judge:"):
        return f"judge:{identity(name.removeprefix('judge:'))}"
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py") and Path(file).is_file():
        return f"{function} {file_sha256(Path(file))[:16]}"
    if (Path(name) / MANIFEST).is_file():
        return read_manifest(name).content_hash
    return data_sha256(name)[:16] if Path(name).exists() else name

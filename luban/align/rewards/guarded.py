"""A helpfulness and a safety model as one reward (Touvron et al. 2023b, section 3.2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from luban.align.rewards.base import Answer
from luban.align.rewards.model import ModelReward
from luban.core.errors import UsageError

LEAST = 0.15  # probability below which an answer counts as unsafe


def combine(safety: np.ndarray, helpfulness: np.ndarray, tagged: np.ndarray, least: float = LEAST) -> np.ndarray:
    """(N,) scores: the safety model's where the prompt is tagged as one that could draw unsafe answers or where the probability
    σ(safety) is below `least`, else the helpfulness model's. Both are scores before the sigmoid, so that the paper's logit is
    taken already; PPO divides by their spread with `rl.whiten_rewards`.

    Args:
        safety, helpfulness: (N,). tagged: (N,) bool.
    """
    unsafe = safety < math.log(least / (1 - least))
    return np.where(tagged | unsafe, safety, helpfulness)


class GuardedReward:
    """Two reward models, scores 0 being the mean of the answers that each prefers. A prompt is tagged by `"unsafe": true` in its row.

    Args:
        safety, helpfulness: runs of `luban reward`.
        least: see `combine`.

    Raises what `ModelReward` does.
    """

    def __init__(self, safety: ModelReward, helpfulness: ModelReward, least: float = LEAST):
        self.name = f"{helpfulness.name}_guarded"
        self.safety, self.helpfulness, self.least = safety, helpfulness, least
        if not 0 < least < 1:
            raise UsageError(f"the probability below which an answer is unsafe lies between 0 and 1, {least} given")

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer."""
        safe, helpful = (np.array(model.scores(answers)) for model in (self.safety, self.helpfulness))
        tagged = np.array([bool(answer.row.get("unsafe")) for answer in answers])
        return combine(safe, helpful, tagged, self.least).tolist()


def split_name(name: str) -> tuple[str, str, float]:
    """(safety model, helpfulness model, least) of guarded:SAFETY:HELPFULNESS[:LEAST]. Raises UsageError for another form."""
    _, *parts = name.split(":")
    try:
        least = float(parts[2]) if len(parts) == 3 else LEAST
    except ValueError:
        least = math.nan
    if len(parts) not in (2, 3) or not all(parts) or math.isnan(least):
        raise UsageError(f"'{name}' isn't guarded:SAFETY:HELPFULNESS or guarded:SAFETY:HELPFULNESS:PROBABILITY")
    return parts[0], parts[1], least

"""The score of a reward model, on token ids as they were generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luban.align.rewards.base import Answer
from luban.align.scoring import RewardModel
from luban.tokenizer.tokenizer import Tokenizer


class ModelReward:
    """A reward model. LineageError unless it reads the policy's tokens and template."""

    def __init__(self, path: str, tokenizer: Tokenizer, owner: str, device: str):
        self.name = Path(path).name
        self.model = RewardModel.load(path, device, "bfloat16" if device.startswith("cuda") else "float32")
        self.model.require_tokenizer(tokenizer, owner)

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer; nothing is tokenised again."""
        return self.model.scores([[*answer.prompt_ids, *answer.ids] for answer in answers])

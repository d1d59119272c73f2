"""Grades of a judge as a reward: a language model, an address, a rule (`luban.align.judges`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from luban.align.judges import open_judge
from luban.align.preferences import as_messages
from luban.align.prompts import prompt_of
from luban.align.rewards.base import Answer
from luban.core.errors import TrainingError, UsageError
from luban.evals.judges.base import Judge, Single
from luban.evals.run import EvalOptions


class JudgeReward:
    """A judge's grade of each answer, from 1 to 10; of a reward model its score. A row's `reference` is shown to the judge.

    Args:
        judge: asks the same way each time (no draws), so that a run is resumed with the same rewards.
    """

    def __init__(self, judge: Judge):
        self.judge, self.name = judge, f"judge_{Path(judge.name).name}".replace(":", "_")

    @classmethod
    def open(cls, name: str, device: str, timeout: float) -> JudgeReward:
        """The judge behind `judge:NAME`; an address takes its key from OPENAI_API_KEY. Raises what `open_judge` does."""
        chosen = name.removeprefix("judge:")
        if not chosen:
            raise UsageError(
                "judge: names no judge: give --reward judge:MODEL, judge:rule:longest or judge:http://ADDRESS"
            )
        key = os.environ.get("OPENAI_API_KEY", "")
        return cls(open_judge(chosen, EvalOptions(device=device, timeout=timeout, api_key=key)))

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer. Raises TrainingError for an answer that the judge gave no grade."""
        asked = [
            Single(prompt=_text(answer), answer=answer.text, reference=str(answer.row.get("reference", "")))
            for answer in answers
        ]
        found = []
        for answer, grade in zip(answers, self.judge.grade(asked), strict=True):
            if grade.grade is None:
                why = grade.failed or f"it said {grade.text[:200]!r}"
                raise TrainingError(
                    f"the judge {self.judge.name} gave no grade to the answer {answer.text[:80]!r}: {why}. The step was not "
                    f"applied"
                )
            found.append(float(grade.grade))
        return found


def _text(answer: Answer) -> str:
    """The prompt as text: of a conversation every message behind its role."""
    messages = as_messages(prompt_of(answer.row), "user")
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)

"""Rewards that check an answer: 1 where it is right."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luban.align.rewards.base import Answer
from luban.core import sandbox
from luban.core.errors import ConfigError, DataError
from luban.core.metrics.abstention import outcome
from luban.core.metrics.numbers import last_number


class GSM8K:
    """Whether the answer's final number is that of the row's `answer` (Cobbe et al. 2021)."""

    name = "gsm8k"

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises DataError for a row without a number to compare with."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        right = last_number(str(answer.row.get("answer", "")))
        if right is None:
            raise DataError("the reward gsm8k needs an `answer` with a number in every row of the prompts")
        return float(last_number(answer.text) == right)


class Facts:
    """1 for a right answer, 0 for one that says it doesn't know, -`penalty` for a wrong one (Schulman 2023): a policy does best that
    answers where it is right with a probability above penalty / (1 + penalty) and abstains elsewhere.

    An answer is right where all of it is the row's `answer`, or one of the list there: an answer that named every possibility would
    contain the right one. Raises ConfigError for a penalty that is no number above 0.
    """

    name = "facts"

    def __init__(self, penalty: str = "1"):
        try:
            self.penalty = float(penalty)
        except ValueError:
            self.penalty = 0.0
        if not 0 < self.penalty < float("inf"):
            raise ConfigError(f"facts:{penalty}: what a wrong answer costs is a number above 0")

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1, 0 or -penalty. Raises DataError for a row without an answer to compare with."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        known = answer.row.get("answer")
        given = known if isinstance(known, list) else [known]
        references = [each for each in given if isinstance(each, str) and each.strip()]
        if not references or len(references) < len(given):
            raise DataError("the reward facts needs an `answer`, text or a list of texts, in every row of the prompts")
        return {"right": 1.0, "abstained": 0.0, "wrong": -self.penalty}[outcome(answer.text, references)]


class Pattern:
    """Whether a regular expression is found in the answer. Raises ConfigError for one that isn't valid."""

    def __init__(self, pattern: str):
        self.name = "regex"
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"regex:{pattern} is no regular expression: {error}") from None

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        return [float(self.pattern.search(answer.text) is not None) for answer in answers]


class UnitTests:
    """Whether the answer's Python code passes the row's `tests` in `luban.core.sandbox`."""

    name = "unit_tests"

    def __init__(self, timeout: float):
        self.timeout = timeout

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises DataError for a row without tests."""
        return [float(self.passes(answer.text, answer.row.get("tests"))) for answer in answers]

    def passes(self, text: str, tests: object) -> bool:
        """True if the code in the answer's fenced blocks (or the whole answer) and the tests run without an error."""
        if not isinstance(tests, str) or not tests.strip():
            raise DataError("the reward unit_tests needs `tests`, Python code, in every row of the prompts")
        return sandbox.passes(sandbox.code_of(text), tests, self.timeout)

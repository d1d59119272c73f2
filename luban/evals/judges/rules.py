"""Judges that are a rule: baselines that say how much a real judge's agreement is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luban.core.errors import UsageError, nearest
from luban.core.metrics.answers import f1
from luban.evals.judges.base import Grade, Judgement, Pair, Single, Verdict


def _by_score(score: Callable[[Single], float]) -> Callable[[Pair], Verdict]:
    def compare(pair: Pair) -> Verdict:
        first, second = (
            score(Single(prompt=pair.prompt, answer=text, reference=pair.reference))
            for text in (pair.first, pair.second)
        )
        return "tie" if first == second else "first" if first > second else "second"

    return compare


def _length(answer: Single) -> float:
    return float(len(answer.answer))


def _reference(answer: Single) -> float:
    return f1(answer.answer, [answer.reference])


RULES: dict[str, tuple[Callable[[Pair], Verdict], Callable[[Single], float]]] = {
    "longest": (_by_score(_length), _length),
    "shortest": (_by_score(lambda answer: -_length(answer)), lambda answer: -_length(answer)),
    "reference": (_by_score(_reference), _reference),  # the nearer to the reference, by F1 of words
    "first": (lambda pair: "first", lambda answer: 10.0),  # always the first: what swapping the order must undo
}


class RuleJudge:
    """Judges by one of `RULES`. Raises UsageError for another name."""

    def __init__(self, name: str):
        if name not in RULES:
            raise UsageError(f"unknown rule '{name}'{nearest(name, RULES)}")
        self.name = self.identity = f"rule:{name}"
        self._compare, self._grade = RULES[name]

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge`."""
        return [Judgement(verdict=self._compare(pair)) for pair in pairs]

    def grade(self, answers: Sequence[Single]) -> list[Grade]:
        """See `Judge`."""
        return [Grade(grade=self._grade(answer)) for answer in answers]

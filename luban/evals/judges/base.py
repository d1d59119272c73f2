"""What a judge does, and single grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from luban.evals.kinds.base import Example

Verdict = Literal["first", "second", "tie"]  # of two answers in the order in which they are shown
SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}  # of the other order


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one prompt, in the order in which the judge reads them."""

    prompt: str
    first: str
    second: str
    reference: str = ""  # a right answer, where one is known

    def swapped(self) -> Pair:
        """The same pair in the other order."""
        return Pair(prompt=self.prompt, first=self.second, second=self.first, reference=self.reference)


@dataclass(frozen=True, kw_only=True)
class Single:
    """One answer."""

    prompt: str
    answer: str
    reference: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a judge said of a pair. `verdict` None: it couldn't be read, or there was no answer (`failed`)."""

    verdict: Verdict | None
    text: str = ""  # as the judge wrote it
    failed: str = ""  # why there is none, where the judge couldn't be asked
    margin: float | None = None  # log-odds for the first answer, of a judge that wants both orders' averaged


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a judge said of one answer. `grade` None as in `Judgement`."""

    grade: float | None  # 1 to 10, or a reward model's score
    text: str = ""
    failed: str = ""


class Judge(Protocol):
    """Compares and grades answers."""

    name: str  # for people

    @property
    def identity(self) -> str:
        """A hash of all that its judgements depend on."""
        ...

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement a pair, in the order that the pair has."""
        ...

    def grade(self, answers: Sequence[Single]) -> list[Grade]:
        """One grade an answer."""
        ...


def grade_rows(judge: Judge, items: Sequence[Example], rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Put grades into the rows of items that have an answer; returns how many were graded, couldn't be read, and had none."""
    places = [i for i, row in enumerate(rows) if row.get("scores") is not None]
    singles = [
        Single(
            prompt=items[i].question,
            answer=rows[i]["answer"],
            reference=items[i].references[0] if items[i].references else "",
        )
        for i in places
    ]
    counts = {"graded": 0, "unparsed": 0, "judge_failed": 0}
    for i, found in zip(places, judge.grade(singles), strict=True):
        rows[i]["judgement"] = found.text
        if found.grade is not None:
            rows[i]["scores"]["grade"] = found.grade
            counts["graded"] += 1
        else:
            counts["judge_failed" if found.failed else "unparsed"] += 1
    return counts

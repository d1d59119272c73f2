"""What a model writes, graded by another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luban.evals.kinds.base import Example
from luban.evals.kinds.generate import Writing
from luban.evals.measures import Measure, mean_of
from luban.evals.requests import Response
from luban.evals.templates import text_of

if TYPE_CHECKING:
    from luban.evals.spec import TaskSpec


@dataclass(frozen=True, kw_only=True)
class Judged(Writing):
    """Answers are graded from 1 to 10 by the judge of the command line (`--judge`)."""

    needs_judge = True

    def read(self, spec: TaskSpec, row: Mapping[str, Any], id: str) -> Example:
        """The item of a row; a target, where there is one, is shown to the judge as a reference."""
        reference = (text_of(spec.target, row),) if spec.target else ()
        return Example(id=id, row=row, question=text_of(spec.prompt, row), references=reference)

    def score(self, example: Example, responses: Sequence[Response]) -> dict[str, Any]:
        """The answer; `grade` is added when the judge has spoken."""
        answers, seen = self.written(responses)
        return {"answer": answers[0], "references": list(example.references), "scores": {}} | seen

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """The mean grade of the answers whose judgement could be read."""
        graded = [row for row in rows if "grade" in row["scores"]]
        return [mean_of(graded, "grade")] if graded else []

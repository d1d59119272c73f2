"""What a kind of task does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luban.core.registry import Registry, Variant
from luban.evals.requests import Prompt, Request, Response

if TYPE_CHECKING:
    from luban.evals.measures import Measure
    from luban.evals.spec import TaskSpec

KINDS = Registry(
    "kind of task",
    {
        "loglikelihood": "luban.evals.kinds.loglikelihood:Loglikelihood",
        "rolling": "luban.evals.kinds.rolling:Rolling",
        "generate": "luban.evals.kinds.generate:Generate",
        "judge": "luban.evals.kinds.judged:Judged",
        "probe": "luban.evals.kinds.probe:Probe",
    },
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """An item as it is asked."""

    id: str
    row: Mapping[str, Any]  # of the data
    question: str  # what the model reads, without shots
    references: tuple[str, ...] = ()  # right answers; the first one stands behind the question in a shot
    choices: tuple[str, ...] = ()  # texts to choose from
    right: int = -1  # the place of the right one

    @property
    def answer(self) -> str:
        """What stands behind the question in a shot."""
        return self.choices[self.right] if self.choices else self.references[0]


class Kind(Variant):
    """Base of kinds: each is a frozen dataclass of its own settings."""

    registry = KINDS
    has_prompts = True  # whether items are asked after shots
    needs_judge = False  # whether answers are graded by another model

    def check(self, spec: TaskSpec) -> None:
        """Raise ConfigError where fields of the task make no sense together."""

    def read(self, spec: TaskSpec, row: Mapping[str, Any], id: str) -> Example:
        """The item of a row. Raises DataError, which the caller completes with the place of the row."""
        raise NotImplementedError

    def requests(self, example: Example, prompt: Prompt, delimiter: str, repeats: int, seed: int) -> list[Request]:
        """What is asked of the model, in the order in which `score` is given the answers."""
        raise NotImplementedError

    def score(self, example: Example, responses: Sequence[Response]) -> dict[str, Any]:
        """The row of an item in answers.jsonl: `answer`, `reference`, `scores` (name → number) and what else there is to see."""
        raise NotImplementedError

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """The figures of scored rows."""
        raise NotImplementedError

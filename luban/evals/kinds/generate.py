"""What a model writes, scored against references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luban.core.errors import ConfigError, DataError
from luban.evals.filters import Filter
from luban.evals.kinds.base import Example, Kind
from luban.evals.measures import Measure
from luban.evals.requests import Prompt, Request, Response, Write, Written
from luban.evals.scorers import ExactMatch, Scorer
from luban.evals.templates import text_of, value_of

if TYPE_CHECKING:
    from luban.evals.spec import TaskSpec


@dataclass(frozen=True, kw_only=True)
class Writing(Kind):
    """Base of kinds whose answers are written."""

    max_tokens: int = 512  # of an answer; how many reach it is counted
    stop: tuple[str, ...] = ()  # strings that end an answer
    temperature: float = 0.0  # 0: greedy; above: sampled, by seed
    top_p: float = 1.0  # the smallest set of likeliest tokens with this much probability
    filters: tuple[Filter, ...] = ()  # applied to the answer in this order

    def check(self, spec: TaskSpec) -> None:
        """Repeats must differ."""
        if not spec.prompt:
            raise ConfigError("missing field 'prompt': what is asked")
        if spec.repeats > 1 and self.temperature == 0:
            raise ConfigError(
                f"{spec.repeats} repeats of greedy answers are all the same: set kind.temperature, or give --temperature"
            )
        if self.max_tokens < 1:
            raise ConfigError(f"kind.max_tokens must be at least 1, {self.max_tokens} given")

    def requests(self, example: Example, prompt: Prompt, delimiter: str, repeats: int, seed: int) -> list[Request]:
        """One a repeat."""
        return [
            Write(
                prompt=prompt,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                stop=self.stop,
                sample=sample,
                seed=seed if self.temperature else 0,
            )
            for sample in range(repeats)
        ]

    def written(self, responses: Sequence[Response]) -> tuple[list[str], dict[str, Any]]:
        """(answers, filters applied; what else a row says of them)."""
        found = [each for each in responses if isinstance(each, Written)]
        answers = []
        for each in found:
            text = each.text
            for step in self.filters:
                text = step.apply(text)
            answers.append(text)
        seen: dict[str, Any] = {"raw": found[0].text, "finish_reason": found[0].finish_reason}
        if len(found) > 1:
            seen |= {"answers": answers, "raws": [each.text for each in found]}
        if cut := max(each.truncated for each in found):
            seen["truncated"] = cut
        return answers, seen


@dataclass(frozen=True, kw_only=True)
class Generate(Writing):
    """The answer is scored by each of `metrics`."""

    metrics: tuple[Scorer, ...] = (ExactMatch(),)

    def check(self, spec: TaskSpec) -> None:
        """Scores need something to compare with."""
        super().check(spec)
        if not self.metrics:
            raise ConfigError("kind.metrics names at least one metric")
        if not spec.target and any(metric.needs_reference for metric in self.metrics):
            raise ConfigError("missing field 'target': what answers are compared with")
        for metric in self.metrics:
            if max(getattr(metric, "k", (1,))) > spec.repeats:
                raise ConfigError(f"pass@{max(metric.k)} needs as many repeats, {spec.repeats} given")  # type: ignore[attr-defined]

    def read(self, spec: TaskSpec, row: Mapping[str, Any], id: str) -> Example:
        """The item of a row; its references are text, a number or a list of these."""
        found = value_of(spec.target, row) if spec.target else ""
        several = list(found) if isinstance(found, (list, tuple)) else [found]
        if not several or not all(isinstance(each, (str, int, float)) for each in several):
            raise DataError(f"the target must be text or a list of texts, {found!r:.60} given")
        return Example(id=id, row=row, question=text_of(spec.prompt, row), references=tuple(map(str, several)))

    def score(self, example: Example, responses: Sequence[Response]) -> dict[str, Any]:
        """The answer and its scores."""
        answers, seen = self.written(responses)
        scores = {name: value for metric in self.metrics for name, value in metric.score(answers, example).items()}
        return {"answer": answers[0], "references": list(example.references), "scores": scores} | seen

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """Those of the metrics."""
        return [measure for metric in self.metrics for measure in metric.measures(rows)]

"""Which of several continuations a model finds likeliest, or whether it would write the one that is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luban.core.errors import ConfigError, DataError
from luban.evals.kinds.base import Example, Kind
from luban.evals.measures import Measure, mean_of, ratio_of
from luban.evals.requests import Prompt, Request, Response, Score, Scored
from luban.evals.templates import text_of, value_of

if TYPE_CHECKING:
    from luban.evals.spec import TaskSpec

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Loglikelihood(Kind):
    """With choices: acc (the likeliest), acc_norm (the likeliest a byte of its text), brier, and acc_unconditional (the one that
    gains most by the question; Brown et al. 2020). Without: acc (every token is the likeliest one) and perplexity."""

    choices: str | tuple[str, ...] = ()  # a template that gives a list, or a template a choice
    unconditional: bool = False  # also ask for each choice without the question
    unconditional_context: str = ""  # what stands in the question's place, such as "Answer:"
    bare_target: bool = (
        False  # a target without choices is scored without target_delimiter, as lm-evaluation-harness does
    )

    def check(self, spec: TaskSpec) -> None:
        """A prompt and a target are needed."""
        if not spec.target:
            raise ConfigError("missing field 'target': a loglikelihood task needs the right answer")
        if spec.repeats > 1:
            raise ConfigError("repeats are for generate tasks: likelihoods are the same every time")

    def read(self, spec: TaskSpec, row: Mapping[str, Any], id: str) -> Example:
        """The item of a row."""
        question = text_of(spec.prompt, row) if spec.prompt else ""
        if not self.choices:
            return Example(id=id, row=row, question=question, references=(text_of(spec.target, row),))
        found = (
            value_of(self.choices, row) if isinstance(self.choices, str) else [text_of(c, row) for c in self.choices]
        )
        if found == self.choices:  # the text of a template without an expression, which is therefore a field's name
            raise DataError(f"the field {found!r}, which choices names, isn't there (known: {', '.join(row)})")
        if not isinstance(found, (list, tuple)) or len(found) < 2 or not all(isinstance(c, str) and c for c in found):
            raise DataError(f"choices must be a list of at least two texts, {found!r:.80} given")
        right = self._right(value_of(spec.target, row), found)
        return Example(id=id, row=row, question=question, choices=tuple(found), right=right, references=(found[right],))

    def _right(self, target: Any, choices: Sequence[str]) -> int:
        """The place of the right choice. Raises DataError for an answer outside of the choices."""
        if isinstance(target, str):
            bare = target.strip()
            if bare in choices or target in choices:
                return list(choices).index(target if target in choices else bare)
            if bare.isdecimal():
                target = int(bare)
            elif len(bare) == 1 and bare.upper() in LETTERS[: len(choices)]:
                return LETTERS.index(bare.upper())
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
            return target
        raise DataError(f"the answer {target!r:.40} is none of the {len(choices)} choices")

    def requests(self, example: Example, prompt: Prompt, delimiter: str, repeats: int, seed: int) -> list[Request]:
        """A score a choice; then, where asked for, each without the question."""
        texts = example.choices or example.references
        if self.bare_target and not example.choices:
            delimiter = ""
        asked: list[Request] = [Score(context=prompt, continuation=delimiter + text) for text in texts]
        if self.unconditional and example.choices:
            asked += [Score(context=self.unconditional_context, continuation=delimiter + text) for text in texts]
        return asked

    def score(self, example: Example, responses: Sequence[Response]) -> dict[str, Any]:
        """The likelihood of each choice, and what would be chosen by it."""
        found = [response for response in responses if isinstance(response, Scored)]
        cut = {"truncated": most} if (most := max(each.truncated for each in found)) else {}
        if not example.choices:
            (one,) = found
            scores = {"acc": float(one.greedy), "nats": -one.logprob, "items": 1.0, "tokens": float(one.tokens)}
            return {
                "answer": {"logprob": one.logprob, "greedy": one.greedy},
                "reference": example.answer,
                "scores": scores,
            } | cut
        count = len(example.choices)
        total = np.array([each.logprob for each in found[:count]])
        a_byte = total / [len(choice.encode()) for choice in example.choices]
        likelihoods = np.exp(total - total.max())
        likelihoods /= likelihoods.sum()
        wanted = np.eye(count)[example.right]
        picked = {"acc": int(total.argmax()), "acc_norm": int(a_byte.argmax())}
        if len(found) > count:
            picked["acc_unconditional"] = int((total - [each.logprob for each in found[count:]]).argmax())
        scores = {name: float(place == example.right) for name, place in picked.items()}
        return {
            "answer": picked["acc"],
            "picked": picked,
            "reference": example.right,
            "choices": [
                {"text": text, "logprob": each.logprob, "tokens": each.tokens}
                for text, each in zip(example.choices, found, strict=False)
            ],
            "scores": scores | {"brier": float(np.square(likelihoods - wanted).sum())},
        } | cut

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """Accuracies, and the Brier score or the perplexity."""
        names = [name for name in rows[0]["scores"] if name.startswith("acc")]
        found = [mean_of(rows, name) for name in names]
        if "brier" in rows[0]["scores"]:
            return [*found, mean_of(rows, "brier", better="lower")]
        perplexity = ratio_of(rows, "perplexity", "nats", "items", exponential=True)
        per_token = ratio_of(rows, "nats_per_token", "nats", "tokens")
        return [*found, *(each for each in (perplexity, per_token) if each and math.isfinite(each.value))]

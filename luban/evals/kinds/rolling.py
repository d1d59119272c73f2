"""How well a model predicts whole texts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luban.core.errors import ConfigError, DataError
from luban.evals.kinds.base import Example, Kind
from luban.evals.measures import Measure, ratio_of
from luban.evals.requests import Prompt, Request, Response, Roll, Rolled
from luban.evals.templates import text_of

if TYPE_CHECKING:
    from luban.evals.spec import TaskSpec

SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Rolling(Kind):
    """bits_per_byte, and perplexity by byte, word (what white space divides) and token, each over all texts together."""

    has_prompts = False

    def check(self, spec: TaskSpec) -> None:
        """The text is the target; there are no shots."""
        if not spec.target or spec.prompt or spec.shots or spec.repeats > 1:
            raise ConfigError("a rolling task has a target, the text; it has no prompt, shots or repeats")

    def read(self, spec: TaskSpec, row: Mapping[str, Any], id: str) -> Example:
        """The text of a row."""
        text = text_of(spec.target, row)
        if not text:
            raise DataError("the text is empty")
        return Example(id=id, row=row, question="", references=(text,))

    def requests(self, example: Example, prompt: Prompt, delimiter: str, repeats: int, seed: int) -> list[Request]:
        """The text."""
        return [Roll(text=example.answer)]

    def score(self, example: Example, responses: Sequence[Response]) -> dict[str, Any]:
        """Nats, and what they are divided by."""
        (found,) = responses
        assert isinstance(found, Rolled)
        text = example.answer
        sizes = {"bytes": len(text.encode()), "words": len(SPACES.split(text)), "tokens": found.tokens}
        bits = found.nats / math.log(2) / sizes["bytes"]
        return {"answer": None, "reference": text, "scores": {"nats": found.nats, "bits_per_byte": bits, **sizes}}

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """The figures of all texts together."""
        found = [
            ratio_of(rows, "bits_per_byte", "nats", "bytes", scale=math.log(2)),
            ratio_of(rows, "byte_perplexity", "nats", "bytes", exponential=True),
            ratio_of(rows, "word_perplexity", "nats", "words", exponential=True),
            ratio_of(rows, "token_perplexity", "nats", "tokens", exponential=True),
        ]
        return [each for each in found if each is not None]

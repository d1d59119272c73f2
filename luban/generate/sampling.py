"""How tokens are chosen, as data."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from luban.core.errors import ConfigError

MAX_LOGPROBS = 20  # alternatives that may be asked for at each token
MAX_CHOICES = 128
WHOLE = ("max_tokens", "top_k", "logprobs", "n", "seed")  # fields that are whole numbers


def _whole(name: str, value: object) -> int:
    """A whole number, numpy's too. Raises ConfigError for anything else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise ConfigError(f"{name} must be a whole number, {value!r} given")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """One request's way of choosing tokens. `temperature=0` is greedy."""

    max_tokens: int = 256  # tokens generated at most
    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_p: float = 1.0  # keep the smallest set of likeliest tokens with this much probability
    top_k: int = 0  # keep this many likeliest tokens; 0: all
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest
    repetition_penalty: float = 1.0  # tokens that were there already become less likely the larger it is; 1: none does
    presence_penalty: float = 0.0  # taken from the logits of tokens that were generated already (OpenAI's API)
    frequency_penalty: float = 0.0  # the same, times how often they were
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    ignore_eos: bool = False  # go on after an end token
    logprobs: int | None = None  # report log-probabilities, with this many alternatives a token; none: don't
    n: int = 1  # independent continuations of the prompt
    seed: int | None = None  # of the draws; none: another each time

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _whole(name, value))
        checks = (
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or larger"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (self.top_k >= 0, "top_k", "0 (all) or larger"),
            (0 <= self.min_p <= 1, "min_p", "in [0, 1]"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty", "larger than 0"),
            (abs(self.presence_penalty) <= 2, "presence_penalty", "between -2 and 2"),
            (abs(self.frequency_penalty) <= 2, "frequency_penalty", "between -2 and 2"),
            (1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}"),
            (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}"),
            (all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings"),
        )
        for fine, name, right in checks:
            if not fine:
                raise ConfigError(f"{name} must be {right}, {getattr(self, name)!r} given")

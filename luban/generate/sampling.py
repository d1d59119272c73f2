"""How tokens are chosen, as data."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from luban.core.errors import ConfigError
from luban.core.seeding import derive
from luban.generate.structure import Structure

MAX_LOGPROBS = 20  # alternatives that may be asked for at each token
MAX_CHOICES = 128
MAX_BIASES = 1024  # tokens with a bias
MAX_BEAMS = 128
# Numbers beyond these give infinite logits or scores, where any token may come.
LEAST_TEMPERATURE = 1e-6  # below it, as at 0: the likeliest token
LEAST_PENALTY = 1e-6  # of repetition; at most 1 over it
MAX_BIAS = 1e6
MAX_LENGTH_PENALTY = 20
WHOLE = (
    "beams",
    "max_tokens",
    "min_tokens",
    "top_k",
    "logprobs",
    "prompt_logprobs",
    "n",
    "seed",
)  # fields that are whole numbers


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
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit); a mapping is taken too
    structure: Structure | None = None  # the texts among which the answer must be; none: any
    stop: tuple[str, ...] = ()  # strings that end the text; they are not part of it
    stop_token_ids: tuple[int, ...] = ()  # tokens that end the text, beside the model's own; they are no part of it
    min_tokens: int = 0  # no end token comes before so many tokens
    ignore_eos: bool = False  # go on after the model's own end tokens
    logprobs: int | None = None  # report log-probabilities, with this many alternatives a token; none: don't
    prompt_logprobs: int | None = None  # the same for the prompt's tokens after the first
    n: int = 1  # independent continuations of the prompt; with `beams` the best answers
    beams: int = 1  # above 1: beam search of this width, in which nothing is drawn, in the place of sampling
    length_penalty: float = 1.0  # of beam search: sums of log-probabilities are divided by length ** this
    seed: int | None = None  # of the draws; none: another each time

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(_whole("stop_token_ids", t) for t in self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
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
            (
                LEAST_PENALTY <= self.repetition_penalty <= 1 / LEAST_PENALTY,
                "repetition_penalty",
                f"larger than 0, from {LEAST_PENALTY:g} to {1 / LEAST_PENALTY:g}",
            ),
            (abs(self.presence_penalty) <= 2, "presence_penalty", "between -2 and 2"),
            (abs(self.frequency_penalty) <= 2, "frequency_penalty", "between -2 and 2"),
            (1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}"),
            (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}"),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                "prompt_logprobs",
                f"between 0 and {MAX_LOGPROBS}",
            ),
            (1 <= self.beams <= MAX_BEAMS, "beams", f"between 1 and {MAX_BEAMS}"),
            (self.beams == 1 or self.n <= self.beams, "n", f"at most beams ({self.beams})"),
            (
                abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
                "length_penalty",
                f"a number within ±{MAX_LENGTH_PENALTY}",
            ),
            (self.beams == 1 or self.logprobs is None, "logprobs", "left out with beams"),
            (self.beams == 1 or not self.stop, "stop", "left out with beams"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens ({self.max_tokens})"),
            (all(token >= 0 for token in self.stop_token_ids), "stop_token_ids", "token ids"),
            (isinstance(self.structure, Structure | None), "structure", "a luban.Structure"),
            (all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings"),
        )
        for fine, name, right in checks:
            if not fine:
                raise ConfigError(f"{name} must be {right}, {getattr(self, name)!r} given")

    def for_prompt(self, number: int) -> Sampling:
        """These settings for a call's prompt of this number, from 0, so that no two prompts share their draws: those of the first
        come from `seed` itself, as if it were alone, those of another from `seed` and its number."""
        if not number or self.seed is None:
            return self
        return replace(self, seed=derive(self.seed, "prompt", number))

    @property
    def greedy(self) -> bool:
        """Whether always the likeliest token is taken."""
        return self.temperature < LEAST_TEMPERATURE

    @cached_property
    def alters_logits(self) -> bool:
        """Whether logits are changed before a token is drawn, by more than temperature and filters."""
        neutral = self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not (neutral and not self.logit_bias and self.min_tokens == 0 and self.structure is None)


def _biases(given: Mapping[int, float] | Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and a number. Raises ConfigError for anything else, and for more than MAX_BIASES."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        found = {_whole("logit_bias", token): float(bias) for token, bias in pairs}
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias must give a number for every token id, {given!r} given") from None
    if len(found) > MAX_BIASES or not all(token >= 0 and abs(bias) <= MAX_BIAS for token, bias in found.items()):
        raise ConfigError(f"logit_bias must be numbers within ±{MAX_BIAS:g} for at most {MAX_BIASES} token ids")
    return tuple(found.items())

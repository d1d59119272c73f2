"""Requests of a load: when they come and how long they are, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from luban.core.errors import UsageError

SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu")


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths, in tokens: `64`, `uniform:32:512` or `lognormal:MEDIAN:SIGMA`."""

    kind: str
    first: float  # the length, the least, or the median
    second: float = 0.0  # the most, or the standard deviation of the logarithm

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From the command line's spelling. Raises UsageError for another."""
        name, *numbers = text.split(":") if ":" in text else ("fixed", text)
        try:
            values = [float(number) for number in numbers]
        except ValueError:
            values = []
        fine = {
            "fixed": len(values) == 1,
            "uniform": len(values) == 2 and values[0] <= values[1],
            "lognormal": len(values) == 2 and values[1] >= 0,
        }
        if not fine.get(name) or values[0] < 1:
            raise UsageError(f"'{text}' is no distribution of lengths: 64, uniform:32:512 or lognormal:128:0.5")
        return cls(name, *values)

    def draw(self, rng: random.Random) -> int:
        """One length, at least 1."""
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        if self.kind == "lognormal":
            return max(1, round(math.exp(rng.gauss(math.log(self.first), self.second))))
        return int(self.first)


@dataclass(frozen=True)
class Planned:
    """A request that will be sent."""

    at: float  # seconds after the first
    prompt: str
    max_tokens: int


def text_of(rng: random.Random, words: int) -> str:
    """Random words."""
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words))


def plan(
    requests: int,
    rate: float,
    prompts: Lengths,
    answers: Lengths,
    *,
    tokens_a_word: float,
    shared_tokens: int = 0,
    seed: int = 0,
) -> Iterator[Planned]:
    """Requests in the order in which they come.

    Args:
        rate: requests a second, with exponential times between them (a Poisson process); infinite: all at once.
        tokens_a_word: of the server's tokenizer, for `text_of`.
        shared_tokens: that all prompts begin with, beside their own.
    """
    rng, at = random.Random(f"{seed} {rate}"), 0.0
    shared = text_of(random.Random(seed), round(shared_tokens / tokens_a_word))
    for _ in range(requests):
        own = text_of(rng, max(1, round(prompts.draw(rng) / tokens_a_word)))
        yield Planned(at, f"{shared} {own}" if shared else own, answers.draw(rng))
        at += 0.0 if math.isinf(rate) else rng.expovariate(rate)

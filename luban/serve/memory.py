"""How many tokens' keys and values a server may keep, so that requests wait or are refused before memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luban.core.errors import DataError
from luban.core.units import bytes_
from luban.generate.cache import float_parameter
from luban.models.base import Model
from luban.parallel.memory_limits import free_memory

SHARE = 0.5  # of the free memory; the rest is for prompts while they are read, and for caches while they are joined


class RequestTooLarge(DataError):
    """A request whose keys and values would never fit."""


@dataclass(frozen=True)
class CacheBudget:
    """A contiguous cache's limit: it holds as many slots for every sequence as for the longest."""

    slots: int  # tokens over all sequences, padding included
    slot_bytes: int  # of one token's keys and values over all layers
    context: int  # tokens of the longest sequence that the model takes

    @classmethod
    def of(cls, model: Model, cache_bytes: int | None = None) -> CacheBudget:
        """For a loaded model.

        Args:
            cache_bytes: for keys and values of all sequences; None: half of what the device has free.
        """
        weight = float_parameter(model)
        shapes = [layer.mixer.attention(model.spec.width) for layer in model.spec.layers]
        numbers = sum(2 * shape.key_heads * shape.head_dim for shape in shapes if shape is not None)
        sides = 2 if model.spec.body.two_sided else 1  # keys and values of the source too
        slot_bytes = max(sides * numbers * weight.element_size(), 1)
        total = int(SHARE * free_memory(weight.device)) if cache_bytes is None else cache_bytes
        return cls(total // slot_bytes, slot_bytes, model.spec.context)

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Slots that a sequence needs at most."""
        return min(len(prompt) + max_tokens, max(self.context, len(prompt)))

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether sequences of these lengths fit together."""
        lengths = list(lengths)
        return len(lengths) * max(lengths, default=0) <= self.slots

    def longest_answer(self, prompt: Sequence[int], n: int) -> int:
        """Tokens that each of `n` answers to a prompt may have; at least 1."""
        return max(1, min(self.context, self.slots // n) - len(prompt))

    def require(self, prompt: Sequence[int], max_tokens: int, n: int) -> None:
        """Raise RequestTooLarge where a request wouldn't fit even alone."""
        longest = self.tokens(prompt, max_tokens)
        if not self.holds([longest] * n):
            raise RequestTooLarge(
                f"{n} × {longest} tokens (the prompt and max_tokens) need {bytes_(n * longest * self.slot_bytes)} of keys "
                f"and values, and {bytes_(self.slots * self.slot_bytes)} are available: ask for fewer answers (n), a "
                "smaller max_tokens or a shorter prompt"
            )

"""Generation from encoder–decoders: a prompt is a source, read once; the answer grows in the decoder.

B sequences, S source tokens, T decoder tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import UnsupportedError
from luban.generate.cache import ContextError, ContiguousCache
from luban.generate.session import Sequence, Session, check_ids
from luban.models.block.cross import Memory
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import ModelSpec
from luban.nn.attention.mask import Scores


class SourceCache(ContiguousCache):
    """The decoder's keys and values, and what the encoder read, of the same sequences."""

    def __init__(self, memory: Memory, **shape: Any):
        super().__init__(**shape)
        self.memory = memory

    def select(self, rows: list[int]) -> None:
        """Keep these sequences, in this order."""
        super().select(rows)
        layers = [(keys[rows], values[rows]) for keys, values in self.memory.layers]
        hidden = self.memory.scores.mask
        self.memory = Memory(layers, Scores(mask=None if hidden is None else hidden[rows]))

    def join(self, other: ContiguousCache) -> None:
        """Take up the sequences of `other` below these, the shorter sources padded on the left."""
        assert isinstance(other, SourceCache)
        super().join(other)
        self.memory = joined(self.memory, other.memory)


def joined(a: Memory, b: Memory) -> Memory:
    """The sequences of both, `a`'s first."""
    slots = [memory.layers[0][0].shape[2] for memory in (a, b)]
    room = [max(slots) - size for size in slots]

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, more, 0)) for x, more in zip((first, second), room, strict=True)])

    layers = [(both(ka, kb), both(va, vb)) for (ka, va), (kb, vb) in zip(a.layers, b.layers, strict=True)]
    if room == [0, 0] and a.scores.mask is None and b.scores.mask is None:
        return Memory(layers, Scores())
    masks = []
    for memory, more in zip((a, b), room, strict=True):
        keys, hidden = memory.layers[0][0], memory.scores.mask
        hidden = keys.new_zeros(len(keys), 1, 1, keys.shape[2]) if hidden is None else hidden
        masks.append(F.pad(hidden, (more, 0), value=float("-inf")))
    return Memory(layers, Scores(mask=torch.cat(masks)))


class SourceSession(Session):
    """Runs an encoder–decoder over sequences: the decoder begins with the token that its body names.

    Args:
        module: an encoder–decoder with a language_model head. UnsupportedError where another head reads it, or its
            specification doesn't say what the decoder begins with.
    """

    def require(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError unless this model writes text."""
        head = spec.head.registry.name_of(type(spec.head))
        if head != "language_model":
            raise UnsupportedError(f"generating text needs a language_model head; this encoder–decoder has head {head}")
        if spec.body.decoder_start is None:
            raise UnsupportedError("this encoder–decoder doesn't say which token its decoder begins with: give the id as "
                                   "body.decoder_start of its spec.json (decoder_start_token_id of a config.json)")  # fmt: skip

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a source is empty, too long, or holds ids outside the vocabulary."""
        check_ids(prompt, self.spec)
        if len(prompt) > self.spec.context:
            raise ContextError(f"the source has {len(prompt)} tokens, and the model reads {self.spec.context} at most: "
                               "shorten it")  # fmt: skip

    def full(self, sequence: Sequence) -> bool:
        """Whether the decoder has no room for another token."""
        return 1 + len(sequence.tokens) >= self.spec.context

    def seen(self, sequence: Sequence) -> list[int]:
        """The decoder's tokens: the source may be repeated."""
        body = self.spec.body
        assert isinstance(body, EncoderDecoderBody) and body.decoder_start is not None
        return [body.decoder_start, *sequence.tokens]

    def _prefill(self, prompts: list[list[int]]) -> tuple[SourceCache, Tensor]:
        body = self.spec.body
        assert isinstance(body, EncoderDecoderBody) and body.decoder_start is not None
        tokens, mask = self._padded(prompts)
        cache = SourceCache(self.module.encode(tokens, mask), **self._cache_shape(len(prompts)))
        begin = torch.full((len(prompts), 1), body.decoder_start, device=tokens.device)
        logits = self._next_logits(begin, None, cache)
        if body.decoder_second is not None:
            certain = torch.full_like(logits, float("-inf"))
            certain[:, body.decoder_second] = 0.0
            logits = certain
        return cache, logits

    def _next_logits(self, tokens: Tensor, mask: Tensor | None, cache: ContiguousCache) -> Tensor:
        assert isinstance(cache, SourceCache)
        hidden = self.module(None, tokens, decoder_mask=mask, cache=cache, memory=cache.memory, output="hidden")
        return self.module.head(hidden[:, -1]).float()


def session_for(module: nn.Module) -> Session:
    """The session that runs this model."""
    return SourceSession(module) if isinstance(module.spec.body, EncoderDecoderBody) else Session(module)

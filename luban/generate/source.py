"""Generation from encoder–decoders: a prompt is a source, read once; the answer grows in the decoder.

B sequences, S source tokens, T decoder tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.generate.cache import ContiguousCache, PromptTooLong, float_parameter
from luban.generate.session import Sequence, Session, check_ids
from luban.models.base import Model
from luban.models.encoder_decoder import EncoderDecoder
from luban.models.spec import ModelSpec
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import EncoderStates


class SourceSession(Session):
    """Runs an encoder–decoder over sequences: the decoder begins with the token that its body names.

    Args:
        module: an encoder–decoder with a language_model head. UnsupportedError where it has another head, or its
            specification doesn't say what the decoder begins with.
    """

    def require(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError unless this model writes text."""
        head = spec.head.registry.name_of(type(spec.head))
        if head != "language_model":
            raise UnsupportedError(f"generating text needs a language_model head; this encoder–decoder has head {head}")
        if spec.body.decoder_start_ids() is None:
            raise UnsupportedError(
                "this encoder–decoder doesn't say which token its decoder begins with: give the id as "
                "body.decoder_start of its spec.json (decoder_start_token_id of a config.json)"
            )

    module: EncoderDecoder

    @property
    def start(self) -> int:
        """The token that the decoder begins with."""
        ids = self.spec.body.decoder_start_ids()
        assert ids is not None  # `require` refused the model otherwise
        return ids[0]

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a source is empty, too long, or holds ids outside the vocabulary."""
        check_ids(prompt, self.spec)
        if len(prompt) > self.spec.context:
            raise PromptTooLong(
                f"the source has {len(prompt)} tokens, and the model reads {self.spec.context} at most: shorten it"
            )

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Tokens of an answer that the decoder holds after its first."""
        return self.spec.context - 1

    def seen(self, sequence: Sequence) -> list[int]:
        """The decoder's tokens: the source may be repeated."""
        return [self.start, *sequence.tokens]

    def _prefill(self, prompts: list[list[int]]) -> tuple[ContiguousCache, Tensor]:
        tokens, mask = self._padded(prompts)
        cache = ContiguousCache.of(self.module, len(prompts))
        cache.source_mask = mask
        states = self.module.encode(tokens, mask)
        begin = torch.full((len(prompts), 1), self.start, device=tokens.device)
        logits = self._logits(begin, None, cache, states)
        for second in (self.spec.body.decoder_start_ids() or ())[1:]:
            logits = torch.full_like(logits, float("-inf"))
            logits[:, second] = 0.0
        return cache, logits

    def _next_logits(self, tokens: Tensor, mask: Tensor | None, cache: ContiguousCache) -> Tensor:
        dtype = compute_dtype(float_parameter(self.module))
        return self._logits(tokens, mask, cache, EncoderStates(None, cache.source_mask, dtype))

    def _logits(self, tokens: Tensor, mask: Tensor | None, cache: ContiguousCache, states: EncoderStates) -> Tensor:
        hidden = self.module(None, tokens, decoder_mask=mask, cache=cache, encoder_states=states, output="hidden")
        return self.module.read(hidden[:, -1]).float()


def session_for(module: Model) -> Session:
    """The session that runs this model."""
    return SourceSession(module) if module.spec.body.two_sided else Session(module)

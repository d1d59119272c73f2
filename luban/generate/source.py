"""Generation from encoder–decoders: a prompt is a source, read once; the answer grows in the decoder.

B sequences, S source tokens, T decoder tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luban.generate.cache import ContiguousCache, float_parameter
from luban.generate.prompts import SourcePrompts
from luban.generate.session import Session
from luban.models.base import Model
from luban.models.encoder_decoder import EncoderDecoder
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import EncoderStates


class SourceSession(Session):
    """Runs an encoder–decoder over sequences: the decoder begins with the token that its body names.

    Args:
        module: an encoder–decoder with a language_model head. UnsupportedError where it has another head, or its
            specification doesn't say what the decoder begins with.
    """

    prompts_class = SourcePrompts
    module: EncoderDecoder

    def _prefill(self, prompts: list[list[int]]) -> tuple[ContiguousCache, Tensor]:
        tokens, mask = self._padded(prompts)
        cache = ContiguousCache.of(self.module, len(prompts))
        cache.source_mask = mask
        states = self.module.encode(tokens, mask)
        begin = torch.tensor([self.prompts.first_tokens(prompt) for prompt in prompts], device=tokens.device)
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

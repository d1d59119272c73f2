"""Embeddings of texts: the mean of a model's hidden states over the tokens, as unit vectors.

B texts, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.core.errors import DataError, UnsupportedError
from luban.load.model import LoadedModel
from luban.models.encoder_decoder import EncoderDecoder

MAX_TOKENS = 16_384  # that are read together, padding included


class Embedder:
    """Embeds texts with an encoder, the encoder of an encoder–decoder, or a decoder.

    Args:
        model: UnsupportedError for a body that isn't made of Transformer layers.
    """

    def __init__(self, model: LoadedModel):
        if not model.spec.body.stacked:
            name = model.spec.body.registry.name_of(type(model.spec.body))
            raise UnsupportedError(f"embeddings need a model of Transformer layers; {model.name} has body {name}")
        self.model, self.spec = model, model.spec

    def tokens_of(self, text: str | list[int]) -> list[int]:
        """Token ids of a text, with the begin and end tokens that the model's texts have. Raises DataError where it is
        empty, longer than the context or holds ids outside of the vocabulary."""
        m = self.model
        ids = (
            text if isinstance(text, list) else m.need_tokenizer().encode(text, bos=m.begins_with_bos, eos=self._ends())
        )
        if not ids:
            raise DataError("a text to embed is empty: at least one token is needed")
        if not 0 <= min(ids) <= max(ids) < self.spec.vocab_size:
            raise DataError(f"a text to embed holds ids outside the model's vocabulary of {self.spec.vocab_size}")
        if len(ids) > self.spec.context:
            raise DataError(f"a text to embed has {len(ids)} tokens, and the model's context is {self.spec.context}")
        return ids

    def _ends(self) -> bool:
        """Whether texts end with the end token: those of encoders that were trained so."""
        return self.model.ends_with_eos and (self.spec.body.two_sided or not self.spec.body.causal)

    @torch.inference_mode()
    def embed(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, E) float32 on the CPU, each of length 1; texts of similar length are read together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.spec.width)
        while order:
            longest, size = len(texts[order[-1]]), 1
            while size < len(order) and (size + 1) * longest <= MAX_TOKENS:
                size += 1
            group, order = order[-size:], order[:-size]
            found[torch.tensor(group)] = self._group([texts[i] for i in group], longest)
        return torch.nn.functional.normalize(found, dim=-1)

    def _group(self, texts: Sequence[list[int]], longest: int) -> Tensor:
        """(B, E) means, float32 on the CPU, of texts padded on the right to the longest."""
        module = self.model.module
        device = next(module.parameters()).device
        tokens_BT = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
        lengths_B = torch.tensor([len(text) for text in texts], device=device)
        mask_BT = torch.arange(longest, device=device) < lengths_B[:, None]
        padding = None if bool(mask_BT.all()) else mask_BT
        if self.spec.body.two_sided:
            assert isinstance(module, EncoderDecoder)
            hidden_BTE = module.encode(tokens_BT, padding).states
            assert hidden_BTE is not None
        else:
            hidden_BTE = module(tokens_BT, padding, output="hidden")
        summed_BE = torch.where(mask_BT[:, :, None], hidden_BTE.float(), 0.0).sum(
            1
        )  # what stands at padding is undefined
        return (summed_BE / lengths_B[:, None]).cpu()

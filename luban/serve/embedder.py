"""Embeddings of texts: a model's hidden states pooled as the files beside it say, else their mean as a unit vector.

B texts, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.core.errors import DataError, UnsupportedError
from luban.generate.cache import PromptTooLong
from luban.load.model import LoadedModel
from luban.load.pooling import Mode, read_pooling
from luban.models.encoder_decoder import EncoderDecoder
from luban.nn.precision import at_least_float32

MAX_TOKENS = 16_384  # that are read together, padding included
CPU_TOKENS = 2048  # that a CPU reads together, so that its caches hold the activations


class Embedder:
    """Embeds texts with an encoder, the encoder of an encoder–decoder, or a decoder.

    Raises UnsupportedError for a body that isn't made of Transformer layers, and for a pooling that isn't built.
    """

    def __init__(self, model: LoadedModel):
        if not model.spec.body.stacked:
            name = model.spec.body.registry.name_of(type(model.spec.body))
            raise UnsupportedError(f"embeddings need a model of Transformer layers; {model.name} has body {name}")
        self.model, self.spec = model, model.spec
        self.pooling = read_pooling(model.path)
        self.longest = min(self.pooling.longest or model.spec.context, model.spec.context)  # tokens

    def tokens_of(self, text: str | list[int]) -> list[int]:
        """Token ids of a text, with the begin and end tokens that the model's texts have. Raises DataError where it is
        empty, longer than the context or holds ids outside of the vocabulary."""
        if isinstance(text, str):
            head, tail = self.frame()
            ids = [*head, *self.model.need_tokenizer().encode(text), *tail]
        else:
            ids = text
        if not ids:
            raise DataError("a text to embed is empty: at least one token is needed")
        if not 0 <= min(ids) <= max(ids) < self.spec.vocab_size:
            raise DataError(f"a text to embed holds ids outside the model's vocabulary of {self.spec.vocab_size}")
        if len(ids) > self.spec.context:
            raise PromptTooLong(
                f"a text to embed has {len(ids)} tokens, and the model's context is {self.spec.context}"
            )
        return ids

    def frame(self) -> tuple[list[int], list[int]]:
        """Ids before and behind every text: what an encoder's vocabulary puts around texts ([CLS] … [SEP]), else the begin and
        end tokens that the model's texts have; a decoder's have no end."""
        m, tokenizer = self.model, self.model.need_tokenizer()
        encoder = self.spec.body.two_sided or not self.spec.body.causal
        if encoder and any(tokenizer.frame):
            return tokenizer.frame
        begin = [tokenizer.bos_id] if m.begins_with_bos and tokenizer.bos_id is not None else []
        end = [tokenizer.eos_id] if encoder and m.ends_with_eos and tokenizer.eos_id is not None else []
        return begin, end

    def fitted(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of texts as in `tokens_of`, each cut to `longest`, and how many were cut. An empty text has the frame
        alone. Raises DataError where that is empty, too."""
        head, tail = self.frame()
        inner = self.longest - len(head) - len(tail)
        found = self.model.need_tokenizer().encode_batch(list(texts))
        if any(not (ids or head or tail) for ids in found):
            raise DataError("a text to embed is empty: at least one token is needed")
        return [[*head, *ids[:inner], *tail] for ids in found], sum(len(ids) > inner for ids in found)

    @torch.inference_mode()
    def embed(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, E) float32 on the CPU, of length 1 where the pooling says so; texts of similar length are read together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts), self.spec.width)
        most = CPU_TOKENS if next(self.model.module.parameters()).device.type == "cpu" else MAX_TOKENS
        while order:
            longest, size = len(texts[order[-1]]), 1
            while size < len(order) and (size + 1) * longest <= most:
                size += 1
            group, order = order[-size:], order[:-size]
            found[torch.tensor(group)] = self.vectors([texts[i] for i in group]).cpu()
        return found

    def vectors(self, texts: Sequence[list[int]]) -> Tensor:
        """(B, E) float32 (float64 of a float64 model) on the model's device, with gradients where they are enabled, of texts read together."""
        module = self.model.module
        device = next(module.parameters()).device
        longest = max(map(len, texts))
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
        found_BE = pooled(at_least_float32(hidden_BTE), mask_BT, self.pooling.mode)
        return torch.nn.functional.normalize(found_BE, dim=-1) if self.pooling.normalise else found_BE


def pooled(hidden_BTE: Tensor, mask_BT: Tensor, mode: Mode) -> Tensor:
    """(B, E) from hidden states (B, T, E) of texts padded on the right, mask_BT true at their tokens. What stands at padding
    is undefined, and is read by no mode."""
    lengths_B = mask_BT.sum(1)
    if mode == "cls":
        return hidden_BTE[:, 0]
    if mode == "last":
        return hidden_BTE[torch.arange(len(hidden_BTE), device=hidden_BTE.device), lengths_B - 1]
    if mode == "max":
        return hidden_BTE.masked_fill(~mask_BT[:, :, None], -torch.inf).amax(1)
    return torch.where(mask_BT[:, :, None], hidden_BTE, 0.0).sum(1) / lengths_B[:, None]

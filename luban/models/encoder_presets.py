"""Encoders by name, with the heads that they were pretrained with."""

from __future__ import annotations

from dataclasses import replace

from luban.models.arrangement.post import PostNorm
from luban.models.encoder import EncoderBody
from luban.models.head.masked_lm import MaskedLM
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.base import FeedForward
from luban.nn.feedforward.plain import GELU, TanhGELU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned


def _encoder(
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    body: EncoderBody,
    feedforward: FeedForward,
    *,
    pair: bool,
    offset: int = 0,
    eps: float = 1e-12,
) -> ModelSpec:
    return uniform(
        vocab_size=vocab,
        width=width,
        layers=layers,
        context=512,
        position=Learned(offset=offset),
        mixer=Grouped(heads=heads, qkv_bias=True, output_bias=True),
        norm=LayerNorm(eps=eps),
        embedding_norm=LayerNorm(eps=eps),
        feedforward=feedforward,
        arrangement=PostNorm(),
        body=body,
        head=MaskedLM(pair=pair),
        tied_head=True,
        init=NormalInit(std=0.02, scale_residual=False),
    )


def _bert(width: int, layers: int, heads: int) -> ModelSpec:
    return _encoder(30_522, width, layers, heads, EncoderBody(segments=2), GELU(width=4 * width, bias=True), pair=True)


def _roberta(width: int, layers: int, heads: int) -> ModelSpec:
    return _encoder(
        50_265,
        width,
        layers,
        heads,
        EncoderBody(segments=1),
        GELU(width=4 * width, bias=True),
        pair=False,
        offset=2,
        eps=1e-5,
    )


def _albert(width: int, layers: int, heads: int) -> ModelSpec:
    body = EncoderBody(segments=2, embeddings=128)
    spec = _encoder(30_000, width, layers, heads, body, TanhGELU(width=4 * width, bias=True), pair=True)
    first = spec.layers[0]
    return replace(spec, layers=(first, *[replace(first, share=0)] * (layers - 1)))


ENCODERS: dict[str, ModelSpec] = {  # width, layers, heads
    # BERT (Devlin et al. 2019, section 3)
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    # RoBERTa (Liu et al. 2019, section 2.4): its second table of segments has one row
    "roberta-base": _roberta(768, 12, 12),
    "roberta-large": _roberta(1024, 24, 16),
    # ALBERT (Lan et al. 2020, table 1)
    "albert-base": _albert(768, 12, 12),
    "albert-large": _albert(1024, 24, 16),
    "albert-xlarge": _albert(2048, 24, 16),
    "albert-xxlarge": _albert(4096, 12, 64),
}

"""Encoder–decoders by name."""

from __future__ import annotations

from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.pre import PreNorm
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.plain import GELU, ReLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.learned import Learned
from luban.nn.position.sinusoidal import Sinusoidal
from luban.nn.position.t5 import RelativeBias


def _transformer(width: int, heads: int) -> ModelSpec:
    return uniform(
        vocab_size=37_000,
        width=width,
        layers=6,
        context=1024,
        position=Sinusoidal(),
        norm=LayerNorm(),
        mixer=Grouped(heads=heads),
        feedforward=ReLU(width=4 * width, bias=True),
        arrangement=PostNorm(),
        body=EncoderDecoderBody(),
        tied_head=True,
    )


def _bart(width: int, layers: int, heads: int) -> ModelSpec:
    return uniform(
        vocab_size=50_265,
        width=width,
        layers=layers,
        context=1024,
        position=Learned(offset=2),
        mixer=Grouped(heads=heads, qkv_bias=True, output_bias=True),
        norm=LayerNorm(),
        embedding_norm=LayerNorm(),
        feedforward=GELU(width=4 * width, bias=True),
        arrangement=PostNorm(),
        body=EncoderDecoderBody(),
        head=LanguageModel(bias=True),
        tied_head=True,
    )


def _t5(width: int, layers: int, heads: int, inner: int) -> ModelSpec:
    return uniform(
        vocab_size=32_128,
        width=width,
        layers=layers,
        context=512,
        position=RelativeBias(),
        mixer=Grouped(heads=heads, head_dim=64, score_scale=1.0),
        norm=RMSNorm(eps=1e-6),
        feedforward=ReLU(width=inner),
        arrangement=PreNorm(),
        body=EncoderDecoderBody(),
        head=LanguageModel(scale_hidden=True),
        tied_head=True,
    )


ENCODER_DECODERS: dict[str, ModelSpec] = {
    # the original Transformer (Vaswani et al. 2017, table 3); its attention has no biases
    "transformer-base": _transformer(512, 8),
    "transformer-big": _transformer(1024, 16),
    # BART (Lewis et al. 2020, section 2); the bias a token is one that the release keeps at zero
    "bart-base": _bart(768, 6, 12),
    "bart-large": _bart(1024, 12, 16),
    # T5 (Raffel et al. 2020, section 3.7), vocabulary padded as released
    "t5-small": _t5(512, 6, 8, 2048),
    "t5-base": _t5(768, 12, 12, 3072),
}

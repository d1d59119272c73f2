"""Models by name, as rows of data."""

from __future__ import annotations

from dataclasses import replace

from luban.core.errors import ConfigError, nearest
from luban.models.arrangement.base import Arrangement
from luban.models.arrangement.chatglm import NormedResidual
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.pre import PreNorm
from luban.models.encoder_decoder_presets import ENCODER_DECODERS
from luban.models.encoder_presets import ENCODERS
from luban.models.recurrent_presets import RECURRENT
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.feedforward.gated import GEGLU, SwiGLU
from luban.nn.feedforward.plain import GELU, TanhGELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.gshard import GShard
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.top_k import TopK
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.learned import Learned
from luban.nn.position.rope import Rope
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.two_dimensional import Rope2D


def _llama(
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    inner: int,
    context: int,
    *,
    eps: float = 1e-5,
    base: float = 10_000.0,
    tied: bool = False,
) -> ModelSpec:
    return uniform(
        vocab_size=vocab,
        width=width,
        layers=layers,
        context=context,
        norm=RMSNorm(eps=eps),
        mixer=Grouped(heads=heads, kv_heads=kv_heads),
        feedforward=SwiGLU(width=inner),
        position=Rope(base=base),
        tied_head=tied,
    )


def _gpt(
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    context: int,
    *,
    arrangement: Arrangement | None = None,
    band: int | None = None,
) -> ModelSpec:
    """LayerNorm, learned positions, biases, tied; with a `band` every second layer sees only so many tokens."""
    mixer = Grouped(heads=heads, qkv_bias=True, output_bias=True)
    spec = uniform(
        vocab_size=vocab,
        width=width,
        layers=layers,
        context=context,
        position=Learned(),
        norm=LayerNorm(),
        mixer=mixer,
        feedforward=TanhGELU(width=4 * width, bias=True),
        arrangement=arrangement or PreNorm(),
        tied_head=True,
    )
    if band is None:
        return spec
    banded = replace(spec.layers[0], mixer=replace(mixer, window=band))
    return replace(spec, layers=tuple(banded if i % 2 else spec.layers[0] for i in range(layers)))


def _gpt3(width: int, layers: int, heads: int) -> ModelSpec:
    """Alternating dense and locally banded layers (section 2.1); the paper gives no width of the band: 256 here."""
    return _gpt(50_257, width, layers, heads, 2048, band=256)


def _bloom(width: int, layers: int, heads: int) -> ModelSpec:
    return replace(_gpt(250_880, width, layers, heads, 2048), position=Alibi(), embedding_norm=LayerNorm())


def _falcon(width: int, layers: int, heads: int, kv_heads: int, norms: int) -> ModelSpec:
    return uniform(
        vocab_size=65_024,
        width=width,
        layers=layers,
        context=2048,
        norm=LayerNorm(),
        mixer=Grouped(heads=heads, kv_heads=kv_heads),
        feedforward=GELU(width=4 * width),
        arrangement=Parallel(norms=norms),
        tied_head=True,
    )


def _glam(
    vocab: int, width: int, layers: int, heads: int, inner: int, *, head_dim: int = 128, experts: int = 64
) -> ModelSpec:
    """Gated networks and mixtures of plain ones in turn (Du et al. 2022, section 4).

    Departure: T5's buckets for the relative biases of Dai et al. (2019), in one table that all layers share.
    """
    dense = uniform(
        vocab_size=vocab,
        width=width,
        layers=layers,
        context=1024,
        norm=LayerNorm(),
        mixer=Grouped(heads=heads, head_dim=head_dim),
        feedforward=GEGLU(width=inner),
        position=RelativeBias(),
        tied_head=True,
    )
    mixture = MixtureOfExperts(width=inner, experts=experts, network="gelu", router=GShard(balance=0.01))
    pair = (dense.layers[0], replace(dense.layers[0], feedforward=mixture))
    return replace(dense, layers=pair * (layers // 2))


PRESETS: dict[str, ModelSpec] = {
    # Luban's own: vocabulary, width, layers, heads, key heads, feed-forward width, context
    "tiny": _llama(4096, 64, 4, 4, 2, 192, 1024, tied=True),
    "luban-6m": _llama(4096, 256, 6, 4, 2, 768, 1024),
    "luban-50m": _llama(8192, 576, 12, 9, 3, 1536, 2048),
    # LLaMA (Touvron et al. 2023a, table 2)
    "llama-7b": _llama(32_000, 4096, 32, 32, 32, 11_008, 2048, eps=1e-6),
    "llama-13b": _llama(32_000, 5120, 40, 40, 40, 13_824, 2048, eps=1e-6),
    "llama-33b": _llama(32_000, 6656, 60, 52, 52, 17_920, 2048, eps=1e-6),
    "llama-65b": _llama(32_000, 8192, 80, 64, 64, 22_016, 2048),
    # Llama 2 (Touvron et al. 2023b, table 1)
    "llama2-7b": _llama(32_000, 4096, 32, 32, 32, 11_008, 4096),
    "llama2-13b": _llama(32_000, 5120, 40, 40, 40, 13_824, 4096),
    "llama2-34b": _llama(32_000, 8192, 48, 64, 8, 22_016, 4096),
    "llama2-70b": _llama(32_000, 8192, 80, 64, 8, 28_672, 4096),
    # Jiang et al. 2024, table 1: 8 experts, 2 of them a token
    "mixtral-8x7b": changed(
        _llama(32_000, 4096, 32, 32, 8, 14_336, 32_768, base=1_000_000.0),
        feedforward=MixtureOfExperts(width=14_336, experts=8, router=TopK(active=2)),
    ),
    # GLaM (Du et al. 2022, table 4): vocabulary, width, layers, heads, inner width. The counts of parameters of the smaller ones are
    # those of a vocabulary of 32k, of the largest that of the text's 256k
    "glam-tiny": _glam(4096, 64, 4, 4, 128, head_dim=16, experts=8),  # Luban's own
    "glam-1.7b-64e": _glam(32_000, 2048, 24, 16, 8192),
    "glam-8b-64e": _glam(32_000, 4096, 32, 32, 16_384),
    "glam-64b-64e": _glam(256_000, 8192, 64, 128, 32_768),
    "smollm2-135m": _llama(49_152, 576, 30, 9, 3, 1536, 8192, base=100_000.0, tied=True),
    # vocabulary, width, layers, heads, context
    "gpt1": _gpt(40_478, 768, 12, 12, 512, arrangement=PostNorm()),  # Radford et al. 2018, section 4.1
    # GPT-2 (Radford et al. 2019, table 2; counts are the released models', the table's are too small)
    "gpt2": _gpt(50_257, 768, 12, 12, 1024),
    "gpt2-medium": _gpt(50_257, 1024, 24, 16, 1024),
    "gpt2-large": _gpt(50_257, 1280, 36, 20, 1024),
    "gpt2-xl": _gpt(50_257, 1600, 48, 25, 1024),
    # GPT-3 (Brown et al. 2020, table 2.1): width, layers, heads
    "gpt3-small": _gpt3(768, 12, 12),
    "gpt3-medium": _gpt3(1024, 24, 16),
    "gpt3-large": _gpt3(1536, 24, 16),
    "gpt3-xl": _gpt3(2048, 24, 16),  # the table's 24 heads of 128 don't fit its width of 2,048: 16 of 128 do
    "gpt3-2.7b": _gpt3(2560, 32, 32),
    "gpt3-6.7b": _gpt3(4096, 32, 32),
    "gpt3-13b": _gpt3(5120, 40, 40),  # the table's width of 5,140 contradicts its 40 heads of 128: 5,120 taken
    "gpt3-175b": _gpt3(12_288, 96, 96),
    # BLOOM (Scao et al. 2022, table 3): width, layers, heads
    "bloom-560m": _bloom(1024, 24, 16),
    "bloom-176b": _bloom(14_336, 70, 112),
    # Falcon (Almazrouei et al. 2023): width, layers, heads, key heads, norms a block
    "falcon-7b": _falcon(4544, 32, 71, 1, 1),
    "falcon-40b": _falcon(8192, 60, 128, 8, 2),
    # ChatGLM (Zeng et al. 2022, GLM-130B, and the released code)
    "chatglm-6b": replace(_gpt(130_528, 4096, 28, 32, 2048, arrangement=NormedResidual()), position=Rope2D()),
    "chatglm2-6b": uniform(
        vocab_size=65_024,
        width=4096,
        layers=28,
        context=32_768,
        position=Rope(width=64, pairing="interleaved"),
        mixer=Grouped(heads=32, kv_heads=2, qkv_bias=True),
        feedforward=SwiGLU(width=13_696),
    ),
}
PRESETS |= ENCODERS
PRESETS |= ENCODER_DECODERS
PRESETS |= RECURRENT


def preset(name: str) -> ModelSpec:
    """The specification of this name. Raises ConfigError naming the nearest one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset '{name}'{nearest(name, PRESETS)}")
    return PRESETS[name]

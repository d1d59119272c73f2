"""Models by name, as rows of data."""

from __future__ import annotations

from luban.core.errors import ConfigError, nearest
from luban.models.encoder_presets import ENCODERS
from luban.models.spec import ModelSpec
from luban.nn.attention.grouped import Grouped
from luban.nn.feedforward import SwiGLU
from luban.nn.norm import RMSNorm


def _llama(vocab: int, width: int, layers: int, heads: int, kv_heads: int, inner: int, context: int,
           *, eps: float = 1e-5, tied: bool = False) -> ModelSpec:  # fmt: skip
    return ModelSpec(vocab_size=vocab, width=width, layers=layers, context=context, norm=RMSNorm(eps=eps),
                     attention=Grouped(heads=heads, kv_heads=kv_heads), feedforward=SwiGLU(width=inner),
                     tied_head=tied)  # fmt: skip


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
}
PRESETS |= ENCODERS


def preset(name: str) -> ModelSpec:
    """The specification of this name. Raises ConfigError naming the nearest one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset '{name}'{nearest(name, PRESETS)}")
    return PRESETS[name]

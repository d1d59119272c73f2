"""LLaMA's shape as GGUF files hold it (`general.architecture = "llama"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.convert.base import Pair, attention_of
from luban.models.convert.llama import Llama
from luban.models.spec import ModelSpec
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import Llama3

LAYER = (
    ("mixer_norm", "attn_norm"),
    ("mixer.qkv.v", "attn_v"),
    ("mixer.output", "attn_output"),
    ("feedforward_norm", "ffn_norm"),
    ("feedforward.gate", "ffn_gate"),
    ("feedforward.up", "ffn_up"),
    ("feedforward.down", "ffn_down"),
)
OUTPUT = "output.weight"  # absent where the head is tied
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Interleaved(Pair):
    """Queries or keys whose rotary pairs lie side by side there, and half a head apart here."""

    heads: int = 1

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensor, by name."""
        if theirs.shape[0] % (2 * self.heads):
            raise ArtifactError(
                f"the tensor {self.theirs} of shape {tuple(theirs.shape)} can't hold {self.heads} heads"
            )
        return {self.ours: theirs.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)}


class GGUFLlama:
    """Read alone: there is no writing of GGUF."""

    ignored = re.compile(re.escape(ROPE_FACTORS))  # read for the scaling
    prefix = ""

    def spec(self, metadata: Mapping[str, Any], *, tied: bool, factors: Tensor | None = None) -> ModelSpec:
        """The specification of a file's metadata and, where it holds them, of the `factors` that divide its rotary
        frequencies (Llama 3.1 and later). Raises UnsupportedError for other architectures and scalings."""
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise UnsupportedError(f"GGUF architecture '{architecture}' isn't read; known: llama")

        def need(key: str) -> Any:
            if f"llama.{key}" not in metadata:
                raise ArtifactError(f"the GGUF metadata lacks llama.{key}")
            return metadata[f"llama.{key}"]

        if metadata.get("llama.expert_count", 0):
            raise UnsupportedError("mixtures of experts (llama.expert_count) aren't read")
        width, heads = need("embedding_length"), need("attention.head_count")
        if not isinstance(heads, int) or heads < 1:
            raise ArtifactError(f"the GGUF metadata says llama.attention.head_count = {heads!r}")
        head_dim = metadata.get("llama.attention.key_length", width // heads)
        if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedError("rotary positions over part of a head (llama.rope.dimension_count) aren't read")
        vocabulary = metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))
        config = {
            "vocab_size": vocabulary or need("vocab_size"),
            "hidden_size": width,
            "num_hidden_layers": need("block_count"),
            "max_position_embeddings": need("context_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": need("feed_forward_length"),
            "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": tied,
            "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
            "rope_scaling": self.scaling(metadata),
        }
        spec = Llama().spec(config)
        return spec if factors is None else replace(spec, position=with_factors(spec, factors))

    def scaling(self, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
        """`rope_scaling` as config.json would have it."""
        kind = metadata.get("llama.rope.scaling.type", "none")
        if kind == "none":
            return None
        return {
            "rope_type": kind,
            "factor": metadata.get("llama.rope.scaling.factor"),
            "original_max_position_embeddings": metadata.get("llama.rope.scaling.original_context_length"),
            "rope_theta": metadata.get("llama.rope.freq_base", 10_000.0),
        }

    def config(self, spec: ModelSpec) -> None:
        """Nothing is written in this format."""
        return None

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        attention = attention_of(spec.layers[0])
        yield Pair("decoder.embedding.tokens.weight", "token_embd.weight")
        for index in range(len(spec.layers)):
            ours, theirs = f"decoder.blocks.{index}", f"blk.{index}"
            yield Interleaved(f"{ours}.mixer.qkv.q.weight", f"{theirs}.attn_q.weight", heads=attention.heads)
            yield Interleaved(f"{ours}.mixer.qkv.k.weight", f"{theirs}.attn_k.weight", heads=attention.key_heads())
            yield from (Pair(f"{ours}.{mine}.weight", f"{theirs}.{foreign}.weight") for mine, foreign in LAYER)
        yield Pair("decoder.norm.weight", "output_norm.weight")
        if not spec.tied_head:
            yield Pair("head.weight", OUTPUT)


def with_factors(spec: ModelSpec, factors: Tensor) -> Rope:
    """The rotary positions whose frequencies these factors divide, one a pair: Llama 3.1's blend, whose original context
    and bounds no file says. Raises UnsupportedError for any other factors."""
    position, width = spec.position, attention_of(spec.layers[0]).head_width(spec.width)
    assert isinstance(position, Rope)
    scaling = Llama3(factor=max(float(factors.max()), 1.0))
    plain = position.base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    blend = plain / scaling.scaled(plain, position.base)
    if (
        position.scaling is not None
        or factors.shape != blend.shape
        or not torch.allclose(factors.double(), blend, rtol=1e-4)
    ):
        raise UnsupportedError(
            f"the tensor {ROPE_FACTORS} holds factors of rotary frequencies other than Llama 3.1's, which aren't read"
        )
    return replace(position, scaling=scaling)

"""Decoders as GGUF files hold them: metadata → specification, and what the file calls each tensor.

Which keys there are, their defaults and what they do: llama.cpp's loader (`src/llama-model.cpp`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import ArtifactError, UnsupportedError, nearest
from luban.models.convert.base import Fused, Pair, Scaled, Stacked, TensorNames, attention_of
from luban.models.convert.gemma import Gemma
from luban.models.convert.gemma3 import Gemma3
from luban.models.convert.gguf_keys import ArchitectureKeys
from luban.models.convert.llama import Llama
from luban.models.convert.phi import Phi
from luban.models.convert.phi3 import Phi3
from luban.models.convert.qwen2 import Qwen2
from luban.models.convert.qwen3 import Qwen3
from luban.models.spec import ModelSpec
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import Llama3

ROPE_FACTORS = "rope_freqs.weight"
WHOLE = {  # modules of the whole model, ours and theirs
    "decoder.embedding.tokens": "token_embd",
    "decoder.norm": "output_norm",
    "head": "output",
}
OUTPUT = "output.weight"  # absent where the head is tied
LAYER = {  # modules of a layer
    "mixer_norm": "attn_norm",
    "mixer.qkv.q": "attn_q",
    "mixer.qkv.k": "attn_k",
    "mixer.qkv.v": "attn_v",
    "mixer.q_norm": "attn_q_norm",
    "mixer.k_norm": "attn_k_norm",
    "mixer.output": "attn_output",
    "mixer_output_norm": "post_attention_norm",
    "feedforward_norm": "ffn_norm",
    "feedforward.gate": "ffn_gate",
    "feedforward.up": "ffn_up",
    "feedforward.down": "ffn_down",
    "feedforward_output_norm": "post_ffw_norm",
}
BLOCK = re.compile(r"decoder\.blocks\.(\d+)\.(.+)")
LONG_FACTORS = re.compile(r"rope_factors_(long|short)\.weight")
GEMMA3_27B = 62  # layers of the one Gemma 3 whose scores are scaled by width / heads


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
        halves = theirs.unflatten(0, (self.heads, -1, 2)).transpose(1, 2)
        return {self.ours: halves.flatten(0, 2)}


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    form: type[Llama] | type[Phi]  # the Hugging Face format of the same model
    eps: str = "attention.layer_norm_rms_epsilon"  # key of the norms' eps
    eps_field: str = "rms_norm_eps"
    interleaved: bool = False  # whether rotary pairs lie side by side
    windowed: bool = False  # whether `attention.sliding_window` is followed
    partial: bool = False  # whether part of a head may be rotated


ARCHITECTURES = {
    "llama": Architecture(Llama, interleaved=True),
    "qwen2": Architecture(Qwen2),
    "qwen3": Architecture(Qwen3),
    "gemma": Architecture(Gemma),
    "gemma3": Architecture(Gemma3, windowed=True),
    "phi2": Architecture(Phi, eps="attention.layer_norm_epsilon", eps_field="layer_norm_eps", partial=True),
    "phi3": Architecture(Phi3, windowed=True, partial=True),
}


@dataclass(frozen=True)
class GGUFModel(TensorNames):
    """The tensors of one file. Read alone: there is no writing of GGUF.

    Args:
        architecture: as its metadata names it. UnsupportedError for one that isn't built.
        stored: names of its tensors.
    """

    architecture: str
    stored: frozenset[str]
    ignored: re.Pattern[str] = field(default=re.compile(re.escape(ROPE_FACTORS)), init=False)  # read for the scaling
    prefix: str = field(default="", init=False)

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"GGUF architecture '{self.architecture}' isn't read{nearest(str(self.architecture), ARCHITECTURES)}"
            )
        if any(LONG_FACTORS.fullmatch(name) for name in self.stored):
            raise UnsupportedError("rotary positions with long and short factors (rope_factors_long) aren't read")

    @property
    def own(self) -> Architecture:
        """The row of its architecture."""
        return ARCHITECTURES[self.architecture]

    def spec(self, metadata: Mapping[str, Any], factors: Tensor | None = None) -> ModelSpec:
        """The specification of a file's metadata and, where it holds them, of the `factors` that divide its rotary
        frequencies (Llama 3.1 and later). Raises UnsupportedError for keys that change the computation and aren't built."""
        keys, own = ArchitectureKeys(metadata, self.architecture), self.own
        width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
        if not isinstance(heads, int) or heads < 1 or not isinstance(width, int):
            raise ArtifactError(f"the GGUF metadata says {self.architecture}.attention.head_count = {heads!r}")
        head_dim = keys.get("attention.key_length", width // heads)
        keys.only("attention.value_length", head_dim)
        rotated = keys.get("rope.dimension_count", head_dim)
        if rotated != head_dim and not own.partial:
            raise UnsupportedError(
                f"rotary positions over part of a head ({self.architecture}.rope.dimension_count) aren't read"
            )
        config = {
            "vocab_size": keys.get("vocab_size", 0) or keys.vocabulary() or keys.need("vocab_size"),
            "hidden_size": width,
            "num_hidden_layers": keys.need("block_count"),
            "max_position_embeddings": keys.need("context_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": keys.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": keys.need("feed_forward_length"),
            own.eps_field: keys.need(own.eps),
            "tie_word_embeddings": OUTPUT not in self.stored,
            "rope_theta": keys.get("rope.freq_base", 10_000.0),
            "rope_scaling": keys.scaling(),
        }
        config |= {"partial_rotary_factor": rotated / max(head_dim, 1)} if own.partial else {}
        config |= {"sliding_window": keys.get("attention.sliding_window", 0) or None} if own.windowed else {}
        config |= gemma3(keys, config) if own.form is Gemma3 else {}
        keys.refuse_others()
        spec = own.form().spec(config)
        return spec if factors is None else replace(spec, position=with_factors(spec, factors))

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Tensor by tensor."""
        attention = attention_of(spec.layers[0])
        heads = {"mixer.qkv.q": attention.heads, "mixer.qkv.k": attention.key_heads()}
        for ours, scaled in self._ours(spec):
            theirs, part = self.name(ours)
            kind = ours.rpartition(".")[2]
            joint = theirs.replace("attn_q.", "attn_qkv.")
            if self.own.interleaved and kind == "weight" and part in heads:
                yield Interleaved(ours, theirs, heads=heads[part])
            elif part in ("mixer.qkv.k", "mixer.qkv.v") and re.sub("attn_[kv]\\.", "attn_qkv.", theirs) in self.stored:
                continue
            elif part == "mixer.qkv.q" and joint in self.stored:
                q, k, v = (ours.replace(".q.", f".{name}.") for name in "qkv")
                yield Fused((q, k, v), joint, attention.heads, attention.key_heads(), by_head=False)
            elif part == "feedforward.gate" and theirs not in self.stored:
                yield Stacked((ours, ours.replace(".gate.", ".up.")), theirs.replace("ffn_gate", "ffn_up"))
            elif (
                part == "feedforward.up" and spec.layers[0].feedforward.gated and self._gate(theirs) not in self.stored
            ):
                continue
            else:
                yield replace(scaled, theirs=theirs) if scaled else Pair(ours, theirs)

    def _gate(self, up: str) -> str:
        return up.replace("ffn_up", "ffn_gate")

    def _ours(self, spec: ModelSpec) -> Iterator[tuple[str, Scaled | None]]:
        """Our tensors, and how those are scaled that are."""
        for pair in self.own.form().pairs(spec):
            for ours in (pair.ours,) if isinstance(pair, Pair) else pair.ours:
                yield ours, pair if isinstance(pair, Scaled) else None

    def name(self, ours: str) -> tuple[str, str]:
        """GGUF's name of one of our tensors, and its module in a layer ("": in no layer)."""
        module, _, kind = ours.rpartition(".")
        block = BLOCK.fullmatch(module)
        return (f"blk.{block[1]}.{LAYER[block[2]]}.{kind}", block[2]) if block else (f"{WHOLE[module]}.{kind}", "")


def gemma3(keys: ArchitectureKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Gemma 3's configuration that its files don't hold, or hold in newer ones."""
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == GEMMA3_27B:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    pattern = keys.get("attention.sliding_window_pattern", 6)
    layers = {"sliding_window_pattern": pattern}
    if isinstance(pattern, list):
        layers = {"layer_types": ["sliding_attention" if local else "full_attention" for local in pattern]}
    keys.only("attention.key_length_swa", config["head_dim"])
    keys.only("attention.value_length_swa", config["head_dim"])
    base = keys.get("rope.freq_base_swa", 10_000.0)
    theta = keys.get("rope.freq_base", 1_000_000.0)
    return {**layers, "query_pre_attn_scalar": scalar, "rope_local_base_freq": base, "rope_theta": theta}


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

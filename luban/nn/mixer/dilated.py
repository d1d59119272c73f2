"""Sliding windows with gaps: a token sees every d-th token before it (Longformer, Beltagy et al. 2020, section 3.1).

The tokens at distances that are multiples of d form a class of the row, within which the window has no gaps: the computation is
that of attention in buckets, in time linear in the row.

B batch, T new tokens, S tokens with those in the cache, E model width, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.kernels.buckets import bucket_attention, bucket_attention_dense, chunk_flops, chunk_saved
from luban.nn.context import LayerContext
from luban.nn.linear import Linear, QKVLinear
from luban.nn.mixer.base import AttentionShape, HeadedMixer, LayerShape, TokenState
from luban.nn.mixer.lsh import NOWHERE, by_document


@dataclass(frozen=True, kw_only=True)
class Dilated(HeadedMixer):
    """Heads with windows of one size and different gaps, so that some see near tokens and some far ones."""

    undivided: ClassVar[frozenset[str]] = frozenset({"tensor", "context"})
    bidirectional: ClassVar[bool] = True
    heads: int = 8  # H
    head_dim: int | None = None  # D; none: width / heads
    window: int = 64  # tokens that a head sees: itself and window − 1 before it (in encoders as many after it)
    dilations: tuple[int, ...] = (1, 2, 4, 8)  # distance between them, head by head, repeated for further heads

    def __post_init__(self):
        if min(self.heads, self.window) < 1:
            raise ConfigError(
                f"a dilated window needs at least 1 head and 1 token, {self.heads} and {self.window} given"
            )
        if not self.dilations or min(self.dilations) < 1:
            raise ConfigError(f"dilations must be one or more numbers from 1 on, {list(self.dilations)} given")

    @property
    def span(self) -> int:
        """Tokens before a token that it sees, at least one so that chunks have a size."""
        return max(self.window - 1, 1)

    def attention(self, width: int) -> AttentionShape:
        """Heads, for positions and for the keys and values that are kept."""
        return AttentionShape(self.heads, self.heads, self.head_width(width), masked=False)

    def state_spec(self, width: int) -> tuple[TokenState, ...]:
        """Each head's class of every token."""
        return (TokenState(self.heads, integer=True, padding=NOWHERE),)

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return DilatedAttention(self, shape)

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record linear maps, the windows' attention, output."""
        (batch, seq, width), heads, head_dim = x_BTE.shape, self.heads, self.head_width(shape.width)
        joint = graph.scope("qkv")
        q, k, v = (joint.linear(name, x_BTE, heads * head_dim, role=name, joint=True) for name in ("q", "k", "v"))
        sizes = (batch, heads, 1, seq, self.span, head_dim)
        mixed = graph.add(
            "attention",
            "mixing",
            q,
            k,
            v,
            shape=(batch, heads, seq, head_dim),
            flops=chunk_flops(*sizes, causal=shape.causal),
            saved_elements=chunk_saved(*sizes, causal=shape.causal) + batch * seq * heads * head_dim,
            heads=heads,
            key_heads=heads,
            head_dim=head_dim,
        )
        return graph.linear("output", mixed.view(batch, seq, heads * head_dim), width, role="o")


class DilatedAttention(nn.Module):
    """One layer's dilated windows."""

    def __init__(self, config: Dilated, shape: LayerShape):
        super().__init__()
        self.head_dim = config.head_width(shape.width)
        inner = config.heads * self.head_dim
        self.qkv = QKVLinear(shape.width, queries=inner, keys=inner, bias=False)
        self.attention = ClassAttention(config, shape.causal)
        self.output = Linear(inner, shape.width, bias=False, role="o", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E). Raises DataError for a prefix that earlier tokens see."""
        if ctx.rows.prefix:
            raise DataError("dilated windows keep no prefix visible to earlier tokens: drop `segments`, or use grouped")
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x_BTE))
        return self.output(self.attention(q, k, v, ctx).transpose(1, 2).flatten(-2))


class ClassAttention(nn.Module):
    """Attention of every head within the classes that its dilation makes of the row."""

    mixes_values: ClassVar[str] = "dilated windows"  # its output is a weighted mean of its last tensor argument

    def __init__(self, config: Dilated, causal: bool):
        super().__init__()
        self.config, self.causal = config, causal
        repeated = config.dilations * (config.heads // len(config.dilations) + 1)
        self.dilations = repeated[: config.heads]

    def forward(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, ctx: LayerContext) -> Tensor:
        """(B, H, T, D) → (B, H, T, D)."""
        if ctx.rotation is not None:
            q_BHTD, k_BHTD = ctx.rotation.apply_rotary(q_BHTD, k_BHTD)
        if self.config.window == 1:
            return v_BHTD
        positions_BT = ctx.rows.counted(q_BHTD).long()
        # each gap is an operation's argument: a tensor of them would be copied to the device, which the host would wait for
        of_gap = {gap: positions_BT % gap for gap in set(self.dilations)}
        classes_BHT = torch.stack([of_gap[gap] for gap in self.dilations], 1).expand(q_BHTD.shape[0], -1, -1)
        classes_BHT = by_document(classes_BHT[:, :, None], max(self.dilations), ctx.rows).squeeze(2)
        options = {"span": self.config.span, "causal": self.causal, "scale": q_BHTD.shape[-1] ** -0.5, "shared": False}
        of_all = bucket_attention
        if ctx.cache is not None:
            classes_BHT = ctx.cache.extend(0, classes_BHT)
            k_BHTD, v_BHTD = ctx.cache.update(k_BHTD, v_BHTD)
            of_all = bucket_attention if k_BHTD.shape[2] == q_BHTD.shape[2] else bucket_attention_dense
        return of_all(q_BHTD, k_BHTD, v_BHTD, classes_BHT[:, :, None], **options)

"""Attention by locality-sensitive hashing (Reformer, Kitaev et al. 2020, section 2).

B batch, T new tokens, S tokens with those in the cache, E model width, H heads, D head dim, R rounds, U buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.kernels.buckets import bucket_attention, bucket_attention_dense, chunk_flops, chunk_saved
from luban.nn.context import LayerContext, RowTokens
from luban.nn.linear import JointLinear, Linear
from luban.nn.mixer.base import AttentionShape, HeadedMixer, LayerShape, TokenState

NOWHERE = -1  # the bucket of padding


@dataclass(frozen=True, kw_only=True)
class LSH(HeadedMixer):
    """Queries and keys are one vector x; a token sees those before it that fall into its bucket argmax [xR; −xR] in any of
    several rounds. In training the directions R are drawn anew for every forward; outside of it they stay the same.

    The paper lets a token see its own chunk of the sorted row and the one before; here it sees the last `span` tokens of its
    bucket (`luban.kernels.buckets` says why).
    """

    undivided: ClassVar[frozenset[str]] = frozenset({"tensor", "context"})
    bidirectional: ClassVar[bool] = True
    heads: int = 8  # H
    head_dim: int | None = None  # D; none: width / heads
    buckets: int = 64  # U, even, or 1 for plain attention to the last `span` tokens
    span: int = 64  # tokens of its bucket that a token sees before it (in encoders also after it)
    rounds: int = 4  # R in training
    eval_rounds: int | None = None  # R outside of training; none: as in training

    def __post_init__(self):
        for name in ("heads", "buckets", "span", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"lsh's {name} must be at least 1, {getattr(self, name)} given")
        if self.buckets > 1 and self.buckets % 2:
            raise ConfigError(
                f"lsh's buckets lie on two sides of each direction: an even number or 1, {self.buckets} given"
            )
        if self.eval_rounds is not None and self.eval_rounds < 1:
            raise ConfigError(f"lsh's eval_rounds must be at least 1, {self.eval_rounds} given")

    def rounds_in(self, *, training: bool) -> int:
        """R; one where there is one bucket."""
        if self.buckets == 1:
            return 1
        return self.rounds if training or self.eval_rounds is None else self.eval_rounds

    def attention(self, width: int) -> AttentionShape:
        """Heads, for positions and for the keys and values that are kept."""
        return AttentionShape(self.heads, self.heads, self.head_width(width), masked=False)

    def state_spec(self, width: int) -> tuple[TokenState, ...]:
        """The buckets of every token."""
        return (TokenState(self.heads * self.rounds_in(training=False), integer=True, padding=NOWHERE),)

    def random_numbers(self, width: int, *, training: bool) -> tuple[int, ...] | None:
        """Directions (H, D, R·U/2); none for one bucket."""
        directions = self.rounds_in(training=training) * self.buckets // 2
        return (self.heads, self.head_width(width), directions) if self.buckets > 1 else None

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return LSHAttention(self, shape)

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record linear maps, hashing and the chunks' attention, output; rounds as outside of training."""
        (batch, seq, width), heads, head_dim = x_BTE.shape, self.heads, self.head_width(shape.width)
        rounds = self.rounds_in(training=False)
        joint = graph.scope("qv")
        q, v = (joint.linear(name, x_BTE, heads * head_dim, role=name, joint=True) for name in ("q", "v"))
        hashing = rounds * self.buckets // 2 if self.buckets > 1 else 0
        sizes = (batch, heads, rounds, seq, self.span, head_dim)
        mixed = graph.add(
            "attention",
            "mixing",
            q,
            v,
            shape=(batch, heads, seq, head_dim),
            flops=chunk_flops(*sizes, causal=shape.causal) + 2 * batch * heads * seq * head_dim * hashing,
            saved_elements=chunk_saved(*sizes, causal=shape.causal) + batch * seq * heads * 2 * (head_dim + 1),
            heads=heads,
            key_heads=heads,
            head_dim=head_dim,
        )
        return graph.linear("output", mixed.view(batch, seq, heads * head_dim), width, role="o")


class LSHAttention(nn.Module):
    """One layer's LSH attention."""

    def __init__(self, config: LSH, shape: LayerShape):
        super().__init__()
        self.config, self.causal = config, shape.causal
        self.head_dim = config.head_width(shape.width)
        inner = config.heads * self.head_dim
        self.qv = JointLinear(shape.width, {"q": inner, "v": inner}, bias=False)
        self.attention = BucketAttention(config, shape.causal)
        self.output = Linear(inner, shape.width, bias=False, role="o", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E). Raises DataError for a prefix that earlier tokens see."""
        if ctx.rows.prefix:
            raise DataError("lsh attention keeps no prefix visible to earlier tokens: drop `segments`, or use grouped")
        x_BHTD, v_BHTD = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qv(x_BTE))
        return self.output(self.attention(x_BHTD, v_BHTD, ctx).transpose(1, 2).flatten(-2))


class BucketAttention(nn.Module):
    """Hashing, and attention within buckets."""

    mixes_values: ClassVar[str] = "hash buckets"  # its output is a weighted mean of its last tensor argument

    def __init__(self, config: LSH, causal: bool):
        super().__init__()
        self.config, self.causal = config, causal

    def forward(self, x_BHTD: Tensor, v_BHTD: Tensor, ctx: LayerContext) -> Tensor:
        """Shared queries and keys, and values, (B, H, T, D) → (B, H, T, D)."""
        buckets_BHRT = by_document(self.hashed(x_BHTD, ctx.numbers), self.config.buckets, ctx.rows)
        q_BHTD, k_BHTD = x_BHTD, F.normalize(x_BHTD, dim=-1)
        if ctx.rotation is not None:
            q_BHTD, k_BHTD = ctx.rotation.apply_rotary(q_BHTD, k_BHTD)
        options = {"span": self.config.span, "causal": self.causal}
        if ctx.cache is None:
            return bucket_attention(q_BHTD, k_BHTD, v_BHTD, buckets_BHRT, **options)
        rounds = buckets_BHRT.shape[2]
        buckets_BHRT = ctx.cache.extend(0, buckets_BHRT.flatten(1, 2)).unflatten(1, (-1, rounds))
        k_BHTD, v_BHTD = ctx.cache.update(k_BHTD, v_BHTD)
        of_all = bucket_attention if k_BHTD.shape[2] == q_BHTD.shape[2] else bucket_attention_dense
        return of_all(q_BHTD, k_BHTD, v_BHTD, buckets_BHRT, **options)

    @torch.no_grad()
    def hashed(self, x_BHTD: Tensor, directions_HDP: Tensor | None) -> Tensor:
        """(B, H, R, T) int64: argmax [xR; −xR] of every round; 0 where there is one bucket."""
        batch, heads, tokens, _ = x_BHTD.shape
        if directions_HDP is None:
            return torch.zeros(batch, heads, 1, tokens, dtype=torch.long, device=x_BHTD.device)
        along_BHTRU = (x_BHTD.float() @ directions_HDP.float()).unflatten(-1, (-1, self.config.buckets // 2))
        return torch.cat((along_BHTRU, -along_BHTRU), -1).argmax(-1).transpose(2, 3)


def by_document(buckets_BHRT: Tensor, count: int, rows: RowTokens) -> Tensor:
    """Buckets that tell documents apart, and padding from all of them; without either the same.

    Args:
        count: of buckets a document.
    """
    if rows.documents_BT is not None:
        buckets_BHRT = buckets_BHRT + (rows.documents_BT * count)[:, None, None]
    return buckets_BHRT if rows.real_BT is None else torch.where(rows.real_BT[:, None, None], buckets_BHRT, NOWHERE)

"""Routing attention: heads whose tokens attend within clusters found online, beside heads with a local window (Roy et al. 2021).

B batch, T new tokens, S tokens with those in the cache, E model width, H routing heads, D head dim, C clusters, W tokens of a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor, mask_density
from luban.kernels.buckets import bucket_attention, bucket_attention_dense, chunk_flops, chunk_saved
from luban.kernels.clusters import cluster_attention
from luban.nn.context import LayerContext
from luban.nn.init import InitialValues
from luban.nn.linear import JointLinear, Linear
from luban.nn.mixer.base import AttentionShape, HeadedMixer, LayerShape, TokenState
from luban.nn.mixer.lsh import NOWHERE, by_document

Members = Literal["nearest", "top"]


@dataclass(frozen=True, kw_only=True)
class Routing(HeadedMixer):
    """Routing heads share queries and keys, normalised to length √D; clusters are those of spherical k-means, whose centroids
    follow the tokens by an exponential moving average and are buffers.

    members "top" is the paper's: each cluster takes the W tokens of the row that are nearest to it, so that a token may be in
    several clusters (the mean of what they give it) or in none (0). Which tokens those are depends on later ones: a causal
    model then scores a text with a little knowledge of what follows, and while it generates, what it read stays as it was
    when it was read. members "nearest" has no such leak: a token is in its
    nearest cluster and sees the W tokens of it before its own place.
    """

    undivided: ClassVar[frozenset[str]] = frozenset({"tensor", "context", "shard", "replicate", "pipeline"})
    bidirectional: ClassVar[bool] = True
    online: ClassVar[bool] = True
    heads: int = 8  # local and routing heads together
    local_heads: int | None = None  # of them those that attend to a window; none: half
    head_dim: int | None = None  # D; none: width / heads
    window: int = 256  # of the local heads: a token sees itself and the window − 1 before it
    clusters: int = 16  # C; about √T is the cheapest
    members: Members = "nearest"  # which tokens of a cluster a token sees
    size: int = 64  # W, tokens of a cluster
    decay: float = 0.999  # of the centroids' moving average, a forward

    def __post_init__(self):
        for name in ("heads", "window", "clusters", "size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"routing's {name} must be at least 1, {getattr(self, name)} given")
        if not 0 <= self.local < self.heads:
            raise ConfigError(
                f"routing needs from 0 to {self.heads - 1} local_heads of {self.heads}, {self.local_heads} given"
            )
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"routing's decay must be from 0 to 1, {self.decay} given")

    @property
    def local(self) -> int:
        """Heads that attend to a window."""
        return self.heads // 2 if self.local_heads is None else self.local_heads

    @property
    def routed(self) -> int:
        """H, routing heads."""
        return self.heads - self.local

    def attention(self, width: int) -> AttentionShape:
        """The local heads' window; without local heads only the head dim, for positions."""
        return AttentionShape(self.heads, self.local, self.head_width(width), self.window, masked=bool(self.local))

    def state_spec(self, width: int) -> tuple[TokenState, ...]:
        """Of the routing heads: shared queries and keys, values, and each token's cluster, or how near it is to all."""
        inner = self.routed * self.head_width(width)
        found = TokenState(self.routed, integer=True, padding=NOWHERE)
        if self.members == "top":
            found = TokenState(self.routed * self.clusters, padding=float("-inf"))
        return TokenState(inner), TokenState(inner), found

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return RoutingAttention(self, shape)

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record linear maps, the local heads' attention, clusters and attention within them, output."""
        (batch, seq, width), head_dim, routed = x_BTE.shape, self.head_width(shape.width), self.routed
        joint, sizes = graph.scope("qkv"), {"q": self.heads, "k": self.local, "v": self.heads}
        parts = {
            name: joint.linear(name, x_BTE, heads * head_dim, role=name, joint=True)
            for name, heads in sizes.items()
            if heads
        }
        mixed = []
        if self.local:
            mixed.append(
                graph.add(
                    "attention",
                    "attention",
                    *parts.values(),
                    shape=(batch, self.local, seq, head_dim),
                    flops=4 * batch * seq**2 * self.local * head_dim,
                    saved_elements=batch * seq * self.local * head_dim,
                    mask_density=mask_density(seq, self.window, causal=shape.causal),
                    heads=self.local,
                    key_heads=self.local,
                    head_dim=head_dim,
                )
            )
        mixed.append(
            graph.add(
                "routed",
                "mixing",
                parts["q"],
                parts["v"],
                shape=(batch, routed, seq, head_dim),
                flops=self.routing_flops(batch, seq, head_dim, causal=shape.causal),
                saved_elements=self._saved(batch, seq, head_dim, causal=shape.causal),
                heads=routed,
                key_heads=routed,
                head_dim=head_dim,
            )
        )
        joined = (batch, seq, self.heads * head_dim)
        mixed_BTP = (
            graph.add("joined", "concat", *mixed, shape=joined, saved_elements=batch * seq * joined[-1])
            if len(mixed) > 1
            else mixed[0].view(*joined)
        )
        return graph.linear("output", mixed_BTP, width, role="o")

    def routing_flops(self, batch: int, seq: int, head_dim: int, *, causal: bool = True) -> int:
        """FLOPs of finding clusters and attending within them."""
        finding = 2 * batch * self.routed * seq * head_dim * self.clusters
        if self.members == "top":
            return finding + 4 * batch * self.routed * self.clusters * min(self.size, seq) ** 2 * head_dim
        return finding + chunk_flops(batch, self.routed, 1, seq, self.size, head_dim, causal=causal)

    def _saved(self, batch: int, seq: int, head_dim: int, *, causal: bool) -> int:
        """Elements saved: the normalised tokens, and what attention reads and weighs."""
        normed = batch * self.routed * seq * (head_dim + 2)
        if not self.local:  # else the joined heads are saved
            normed += batch * self.routed * seq * head_dim
        if self.members == "top":
            size = min(self.size, seq)
            return normed + batch * self.routed * (self.clusters * size * (3 * head_dim + size) + seq)
        return normed + chunk_saved(batch, self.routed, 1, seq, self.size, head_dim, causal=causal)


class RoutingAttention(nn.Module):
    """One layer's local and routing heads."""

    def __init__(self, config: Routing, shape: LayerShape):
        super().__init__()
        self.config, self.head_dim = config, config.head_width(shape.width)
        sizes = {"q": config.heads, "k": config.local, "v": config.heads}
        outputs = {name: heads * self.head_dim for name, heads in sizes.items() if heads}
        self.qkv = JointLinear(shape.width, outputs, bias=False)
        self.routed = RoutedHeads(config, self.head_dim, shape.causal)
        self.output = Linear(config.heads * self.head_dim, shape.width, bias=False, role="o", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E). Raises DataError for a prefix that earlier tokens see."""
        if ctx.rows.prefix:
            raise DataError(
                "routing attention keeps no prefix visible to earlier tokens: drop `segments`, or use grouped"
            )
        parts = [part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x_BTE)]
        local, (q_BHTD, v_BHTD) = self.config.local, (parts[0], parts[-1])
        mixed = [self.routed(q_BHTD[:, local:], v_BHTD[:, local:], ctx)]
        if local:
            q, k, v = q_BHTD[:, :local], parts[1], v_BHTD[:, :local]
            if ctx.rotation is not None:
                q, k = ctx.rotation.apply_rotary(q, k)
            mixed.insert(0, ctx.attend(q, k, v))
        return self.output(torch.cat(mixed, 1).transpose(1, 2).flatten(-2))

    def update_statistics(self) -> None:
        """Move the centroids towards the tokens of the last forward; called before every forward in training."""
        self.routed.move_centroids()


class RoutedHeads(nn.Module):
    """Clusters, and attention within them.

    A forward in training only writes down the sums of each cluster's tokens: the centroids move before the next forward, so
    that a layer that is computed twice (rematerialisation, a reversible stack) finds the same clusters both times.
    """

    mixes_values: ClassVar[str] = "clusters"  # its output is a weighted mean of its last tensor argument

    def __init__(self, config: Routing, head_dim: int, causal: bool):
        super().__init__()
        self.config, self.causal = config, causal
        shape = config.routed, config.clusters
        self.register_buffer("centroids", torch.empty(*shape, head_dim))  # (H, C, D), of length 1
        self.register_buffer("sums", torch.empty(*shape, head_dim))  # of the tokens of the last forward by cluster
        self.register_buffer("counts", torch.empty(*shape))
        self.centroids: Tensor
        self.sums: Tensor
        self.counts: Tensor

    def draw_parameters(self, draw: InitialValues) -> None:
        """Random directions."""
        self.centroids.copy_(F.normalize(draw.normal("centroids", self.centroids, 1.0), dim=-1))
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def move_centroids(self) -> None:
        """Centroids ← normalised decay·centroids + (1 − decay)·mean of their tokens; those without tokens stay."""
        found = self.counts[..., None] > 0
        means = F.normalize(self.sums, dim=-1)
        moved = F.normalize(self.config.decay * self.centroids + (1 - self.config.decay) * means, dim=-1)
        self.centroids.copy_(torch.where(found, moved, self.centroids))
        self.counts.zero_()

    def forward(self, x_BHTD: Tensor, v_BHTD: Tensor, ctx: LayerContext) -> Tensor:
        """Shared queries and keys, and values, (B, H, T, D) → (B, H, T, D)."""
        x_BHTD = F.layer_norm(x_BHTD, x_BHTD.shape[-1:])
        likeness_BHTC = x_BHTD.detach() @ self.centroids.to(x_BHTD.dtype).mT
        nearest_BHT = likeness_BHTC.argmax(-1)
        if self.training and torch.is_grad_enabled():
            self._write_down(x_BHTD, nearest_BHT, ctx)
        q_BHTD, k_BHTD = x_BHTD, x_BHTD
        if ctx.rotation is not None:
            q_BHTD, k_BHTD = ctx.rotation.apply_rotary(q_BHTD, k_BHTD)
        if self.config.members == "top":
            return self._in_top(q_BHTD, k_BHTD, v_BHTD, likeness_BHTC, ctx)
        return self._in_nearest(q_BHTD, k_BHTD, v_BHTD, nearest_BHT, ctx)

    def _in_nearest(
        self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, nearest_BHT: Tensor, ctx: LayerContext
    ) -> Tensor:
        """A token sees those of its nearest cluster before it."""
        buckets_BHT = by_document(nearest_BHT[:, :, None], self.config.clusters, ctx.rows).squeeze(2)
        of_all = bucket_attention
        if ctx.cache is not None:
            new = q_BHTD.shape[2]
            k_BHTD, v_BHTD = self._kept(k_BHTD, v_BHTD, ctx)
            buckets_BHT = ctx.cache.extend(2, buckets_BHT)
            of_all = bucket_attention if k_BHTD.shape[2] == new else bucket_attention_dense
        options = {"span": self.config.size, "causal": self.causal, "scale": q_BHTD.shape[-1] ** -0.5}
        return of_all(q_BHTD, k_BHTD, v_BHTD, buckets_BHT[:, :, None], **options)

    def _in_top(
        self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, likeness_BHTC: Tensor, ctx: LayerContext
    ) -> Tensor:
        """A token sees those that the same clusters took. With a cache: as in a row that ends with the new tokens."""
        new, documents_BT = q_BHTD.shape[2], ctx.rows.documents_BT
        if ctx.rows.real_BT is not None:
            likeness_BHTC = likeness_BHTC.masked_fill(~ctx.rows.real_BT[:, None, :, None], float("-inf"))
        if ctx.cache is not None:
            k_BHTD, v_BHTD = self._kept(k_BHTD, v_BHTD, ctx)
            q_BHTD = torch.cat((k_BHTD[:, :, :-new], q_BHTD), 2)  # of the old ones nothing is read
            flat_BPT = ctx.cache.extend(2, likeness_BHTC.transpose(2, 3).flatten(1, 2))
            likeness_BHTC = flat_BPT.unflatten(1, (-1, self.config.clusters)).transpose(2, 3)
        options = {"size": self.config.size, "causal": self.causal, "scale": q_BHTD.shape[-1] ** -0.5}
        return cluster_attention(q_BHTD, k_BHTD, v_BHTD, likeness_BHTC, documents_BT, **options)[:, :, -new:]

    def _kept(self, k_BHTD: Tensor, v_BHTD: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, (B, H, S, D) each."""
        flat = (x.transpose(2, 3).flatten(1, 2) for x in (k_BHTD, v_BHTD))
        kept = (ctx.cache.extend(number, x) for number, x in enumerate(flat))
        k, v = (x.unflatten(1, (-1, k_BHTD.shape[-1])).transpose(2, 3) for x in kept)
        return k, v

    @torch.no_grad()
    def _write_down(self, x_BHTD: Tensor, nearest_BHT: Tensor, ctx: LayerContext) -> None:
        """The sum and number of every cluster's tokens, padding left out."""
        mine_BHTC = F.one_hot(nearest_BHT, self.config.clusters).to(self.sums.dtype)
        if ctx.rows.real_BT is not None:
            mine_BHTC = mine_BHTC * ctx.rows.real_BT[:, None, :, None]
        self.sums.copy_((mine_BHTC.mT @ x_BHTD.to(self.sums.dtype)).sum(0))
        self.counts.copy_(mine_BHTC.sum((0, 2)))

"""Softmax attention with heads in groups: multi-head, grouped-query (Ainslie et al. 2023) and multi-query (Shazeer 2019).

B batch, T tokens, S keys, E model width, H query heads, K key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.nn.context import LayerContext
from luban.nn.linear import Linear, QKVLinear
from luban.nn.mixer.base import AttentionShape, HeadedMixer, LayerShape
from luban.nn.mixer.cross import CrossAttention
from luban.nn.mixer.layout import Layout
from luban.nn.norm import Norm


@dataclass(frozen=True, kw_only=True)
class Grouped(HeadedMixer):
    """Multi-head when K = H, multi-query when K = 1, grouped-query between."""

    crosses = bidirectional = sees_prefix = biased = prompted = True
    heads: int = 8  # H, query heads
    kv_heads: int | None = None  # K, must divide the query heads; none: as many
    head_dim: int | None = None  # D; none: width / heads
    window: int | None = None  # a token sees itself and the window − 1 before it (and after it, in encoders); none: all
    layout: Layout | None = None  # the blocks of keys that a block of queries sees; none: all
    qkv_bias: bool = False  # biases on queries, keys and values
    output_bias: bool = False  # bias on the output
    score_scale: float | None = None  # factor on q·k; none: 1/√D (T5: 1)
    qk_norm: Norm | None = None  # normalises every query and key over its head, before positions

    def __post_init__(self):
        if self.heads < 1 or self.key_heads() < 1 or self.heads % self.key_heads():
            raise ConfigError(
                f"{self.heads} query heads can't share {self.kv_heads} key heads evenly: kv_heads must divide heads"
            )
        if self.head_dim is not None and self.head_dim < 1:
            raise ConfigError(f"head_dim must be at least 1, {self.head_dim} given")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"attention window must be at least 1, {self.window} given")
        if self.window is not None and self.layout is not None:
            raise ConfigError("an attention window and a layout don't go together: a layout has a window of its own")

    def key_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def attention(self, width: int) -> AttentionShape:
        """Heads, window and layout."""
        return AttentionShape(self.heads, self.key_heads(), self.head_width(width), self.window, self.layout)

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return GroupedAttention(self, shape.width)

    def build_cross(self, shape: LayerShape) -> nn.Module:
        """Cross-attention with the same heads."""
        return CrossAttention(self, shape.width)

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Four linear maps, and scores and mixing over the full square (PaLM, appendix B: no causal discount)."""
        seq = x_BTE.shape[1]
        inner, keys = (n * self.head_width(shape.width) for n in (self.heads, self.key_heads()))
        joint = graph.scope("qkv")
        q = joint.linear("q", x_BTE, inner, role="q", bias=self.qkv_bias, joint=True)
        k = joint.linear("k", x_BTE, keys, role="k", bias=self.qkv_bias, joint=True)
        v = joint.linear("v", x_BTE, keys, role="v", bias=self.qkv_bias, joint=True)
        density = self.attention(shape.width).density(seq, causal=shape.causal)
        return self._attend(graph, q, k, v, bias, shape, density)

    def describe_cross(
        self, graph: GraphBuilder, x_BTE: GraphTensor, states_BSE: GraphTensor, shape: LayerShape
    ) -> GraphTensor:
        """The same with keys and values of the encoder's states."""
        inner, keys = (n * self.head_width(shape.width) for n in (self.heads, self.key_heads()))
        joint = graph.scope("kv")
        q = graph.linear("q", x_BTE, inner, role="q", bias=self.qkv_bias)
        k = joint.linear("k", states_BSE, keys, role="k", bias=self.qkv_bias, joint=True)
        v = joint.linear("v", states_BSE, keys, role="v", bias=self.qkv_bias, joint=True)
        return self._attend(graph, q, k, v, None, shape, density=1.0)

    def _attend(
        self,
        graph: GraphBuilder,
        q: GraphTensor,
        k: GraphTensor,
        v: GraphTensor,
        bias: GraphTensor | None,
        shape: LayerShape,
        density: float,
    ) -> GraphTensor:
        """Norms of queries and keys, attention, output: (B, T, H·D), (B, S, K·D) twice → (B, T, E)."""
        heads, key_heads, head_dim = self.heads, self.key_heads(), self.head_width(shape.width)
        (batch, seq, _), source = q.shape, k.shape[1]
        if self.qk_norm is not None:
            q = self.qk_norm.describe(graph, "q_norm", q, (batch, seq, heads, head_dim))
            k = self.qk_norm.describe(graph, "k_norm", k, (batch, source, key_heads, head_dim))
        mixed_BHTD = graph.add(
            "attention",
            "attention",
            *(value for value in (q, k, v, bias) if value is not None),
            shape=(batch, heads, seq, head_dim),
            flops=4 * batch * seq * source * heads * head_dim,
            saved_elements=batch * seq * heads * head_dim,
            mask_density=density,
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
        )
        mixed_BTP = mixed_BHTD.view(batch, seq, heads * head_dim)
        return graph.linear("output", mixed_BTP, shape.width, role="o", bias=self.output_bias)


class GroupedAttention(nn.Module):
    """q, k and v of one input; softmax(q·kᵀ/√D + mask)·v; output."""

    def __init__(self, config: Grouped, width: int):
        super().__init__()
        self.head_dim, self.scale = config.head_width(width), config.score_scale
        inner, keys = config.heads * self.head_dim, config.key_heads() * self.head_dim
        self.qkv = QKVLinear(width, queries=inner, keys=keys, bias=config.qkv_bias)
        self.q_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.output = Linear(inner, width, bias=config.output_bias, role="o", writes_residual=True)
        self.prompts: nn.Module | None = None

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        q_BHTD, k_BKTD, v_BKTD = self.rotated_qkv(x_BTE, ctx)
        mixed_BHTD = ctx.attend(q_BHTD, k_BKTD, v_BKTD, self.scale)
        if self.prompts is not None:
            mixed_BHTD = mixed_BHTD + self.prompts(q_BHTD, self.keys_values, self.scale)
        return self.output(mixed_BHTD.transpose(1, 2).flatten(-2))

    def add_prompts(self, prompts: nn.Module) -> None:
        """Add `prompts(q_BHTD, keys_values, scale)`, (B, H, T, D), to what is mixed (`luban.adapters.llama_adapter`)."""
        self.prompts = prompts

    def keys_values(self, x_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) → keys and values (B, K, S, D) without positions."""
        k_BSKD, v_BSKD = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BSE)[1:])
        if self.k_norm is not None:
            k_BSKD = self.k_norm(k_BSKD)
        return k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)

    def rotated_qkv(self, x_BTE: Tensor, ctx: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D) of the new tokens, with their positions in them."""
        rotation = ctx.rotation
        if rotation is not None and rotation.fused and self.q_norm is None and self.qkv.joins(x_BTE):
            sizes = self.qkv.local_sizes()
            heads, key_heads = sizes["q"] // self.head_dim, sizes["k"] // self.head_dim
            return rotation.apply_rotary_qkv(self.qkv(x_BTE, joint=True), heads, key_heads)
        q_BTHD, k_BTKD, v_BTKD = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BTE))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        q_BHTD, k_BKTD, v_BKTD = (part.transpose(1, 2) for part in (q_BTHD, k_BTKD, v_BTKD))
        if rotation is not None:
            q_BHTD, k_BKTD = rotation.apply_rotary(q_BHTD, k_BKTD)
        return q_BHTD, k_BKTD, v_BKTD

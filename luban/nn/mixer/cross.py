"""Attention from a decoder to what an encoder made (Vaswani et al. 2017, section 3.2.3).

B batch, T decoder tokens, S encoder tokens, H query heads, K key heads, D head dim, E model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from luban.nn.context import LayerContext
from luban.nn.linear import JointLinear, Linear

if TYPE_CHECKING:
    from luban.nn.mixer.grouped import Grouped


class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the encoder; no positions between the two."""

    def __init__(self, config: Grouped, width: int):
        super().__init__()
        self.head_dim, self.scale = config.head_width(width), config.score_scale
        inner, keys = config.heads * self.head_dim, config.key_heads() * self.head_dim
        self.q = Linear(width, inner, bias=config.qkv_bias, role="q")
        self.kv = JointLinear(width, {"k": keys, "v": keys}, bias=config.qkv_bias)
        self.q_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.output = Linear(inner, width, bias=config.output_bias, role="o", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        q_BTHD = self.q(x_BTE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q_BTHD = self.q_norm(q_BTHD)
        mixed_BHTD = ctx.cross_attend(q_BTHD.transpose(1, 2), self.keys_values, self.scale)
        return self.output(mixed_BHTD.transpose(1, 2).flatten(-2))

    def keys_values(self, states_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) encoder states → keys and values (B, K, S, D)."""
        k_BSKD, v_BSKD = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv(states_BSE))
        if self.k_norm is not None:
            k_BSKD = self.k_norm(k_BSKD)
        return k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)

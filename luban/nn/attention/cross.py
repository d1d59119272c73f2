"""Attention from a decoder to what an encoder read (Vaswani et al. 2017, section 3.2.3).

B batch, T decoder tokens, S encoder tokens, H query heads, K key heads, D head width, E model width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from luban.nn.attention.grouped import GroupedAttention
from luban.nn.attention.mask import Scores
from luban.nn.attention.product import attend


class CrossAttention(GroupedAttention):
    """Queries of the decoder, keys and values of the encoder, made once and kept; no positions between the two."""

    joined: ClassVar[tuple[str, ...]] = ()

    def remember(self, memory_BSE: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, E) encoder states → keys and values (B, K, S, D)."""
        k_BSKD, v_BSKD = (p(memory_BSE).unflatten(-1, (-1, self.head_dim)) for p in (self.k, self.v))
        if self.k_norm is not None:
            k_BSKD = self.k_norm(k_BSKD)
        return k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)

    def look(self, x_BTE: Tensor, remembered: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        q_BTHD = self.q(x_BTE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q_BTHD = self.q_norm(q_BTHD)
        mixed_BHTD = attend(q_BTHD.transpose(1, 2), *remembered, scores, self.scale)
        return self.output(mixed_BHTD.transpose(1, 2).flatten(-2))

"""Post-norm (Vaswani et al. 2017, section 3.1; GPT-1, BERT): norm(x + attention(x)), then norm(x + feedforward(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.models.block.serial import Serial, SerialBlock
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod


class PostNormBlock(SerialBlock):
    """One layer of a post-norm Transformer."""

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.attention_norm(x_BTE + self.attention(x_BTE, frame, position, layer))
        return self.feedforward_norm(x_BTE + self.feedforward(x_BTE))


@dataclass(frozen=True, kw_only=True)
class PostNorm(Serial):
    """The stream itself is normalised after every sum, so nothing is left to normalise at the end."""

    module = PostNormBlock
    final_norm = False

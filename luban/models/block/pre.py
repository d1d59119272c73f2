"""Pre-norm, one after the other (GPT-2, LLaMA): x + attention(norm(x)), then x + feedforward(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.models.block.serial import Serial, SerialBlock
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod


class PreNormBlock(SerialBlock):
    """One layer of a pre-norm Transformer."""

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), frame, position, layer)
        return x_BTE + self.feedforward(self.feedforward_norm(x_BTE))


@dataclass(frozen=True, kw_only=True)
class PreNorm(Serial):
    """Each part reads the normalised stream and adds to the plain one."""

    module = PreNormBlock

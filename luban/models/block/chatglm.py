"""ChatGLM-6B's arrangement (its released code): the norms of pre-norm, but the stream that is carried on is the
normalised one, times α = √(2N) for N layers: α·norm(x) + attention(norm(x)), then the same with feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.models.block.serial import Serial, SerialBlock
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class ChatGLMBlock(SerialBlock):
    """One layer."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.alpha = (2 * spec.layers) ** 0.5

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        read = self.attention_norm(x_BTE)
        read = self.feedforward_norm(self.alpha * read + self.attention(read, frame, position, layer))
        return self.alpha * read + self.feedforward(read)


@dataclass(frozen=True, kw_only=True)
class NormedResidual(Serial):
    """Norms before the parts, the residual taken behind the norms."""

    module = ChatGLMBlock

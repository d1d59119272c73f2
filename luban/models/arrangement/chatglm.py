"""ChatGLM-6B's arrangement (its released code): the norms of pre-norm, but the residual is the
normalised input, times α = √(2N) for N layers: α·norm(x) + mixer(norm(x)), then the same with feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext
from luban.nn.mixer.base import LayerShape

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec


class ChatGLMBlock(Block):
    """One layer."""

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__(layer, shape)
        self.alpha = (2 * shape.layers) ** 0.5

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        normed = self.mixer_norm(x_BTE)
        normed = self.feedforward_norm(self.alpha * normed + self.run_mixer(normed, ctx))
        return self.alpha * normed + self.run_feedforward(normed, ctx)


@dataclass(frozen=True, kw_only=True)
class NormedResidual(Arrangement):
    """Norms before the parts, the residual taken behind the norms."""

    block = ChatGLMBlock

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """α·norm(x) + mixer(norm(x)), then the same with feed-forward."""
        normed = parts.norm("mixer_norm", x_BTE)
        normed = parts.norm("feedforward_norm", parts.residual("mixer", normed, parts.mixer(normed)))
        return parts.residual("feedforward", normed, parts.feedforward(normed))

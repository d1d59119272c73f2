"""Pre-norm, one after the other (GPT-2, LLaMA): x + mixer(norm(x)), then x + feedforward(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext


class PreNormBlock(Block):
    """One layer of a pre-norm Transformer."""

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = x_BTE + self.run_mixer(self.mixer_norm(x_BTE), ctx)
        if self.cross is not None and self.cross_norm is not None:
            x_BTE = x_BTE + self.cross(self.cross_norm(x_BTE), ctx)
        return x_BTE + self.run_feedforward(self.feedforward_norm(x_BTE), ctx)


@dataclass(frozen=True, kw_only=True)
class PreNorm(Arrangement):
    """Each part reads the normalised residual and adds to the residual itself."""

    block = PreNormBlock
    crosses = True

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """x + mixer(norm(x)), cross-attention the same, x + feedforward(norm(x))."""
        x_BTE = parts.residual("mixer", x_BTE, parts.mixer(parts.norm("mixer_norm", x_BTE)))
        if parts.layer.cross:
            x_BTE = parts.residual("cross", x_BTE, parts.cross(parts.norm("cross_norm", x_BTE)))
        return parts.residual("feedforward", x_BTE, parts.feedforward(parts.norm("feedforward_norm", x_BTE)))

"""Post-norm (Vaswani et al. 2017, section 3.1; GPT-1, BERT): norm(x + mixer(x)), then norm(x + feedforward(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext


class PostNormBlock(Block):
    """One layer of a post-norm Transformer."""

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.mixer_norm(x_BTE + self.run_mixer(x_BTE, ctx))
        if self.cross is not None and self.cross_norm is not None:
            x_BTE = self.cross_norm(x_BTE + self.cross(x_BTE, ctx))
        return self.feedforward_norm(x_BTE + self.run_feedforward(x_BTE, ctx))


@dataclass(frozen=True, kw_only=True)
class PostNorm(Arrangement):
    """The residual itself is normalised after every sum, so the stack has no norm at its end."""

    block = PostNormBlock
    final_norm = False
    crosses = True

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """norm(x + mixer(x)), cross-attention the same, norm(x + feedforward(x))."""
        x_BTE = parts.norm("mixer_norm", parts.residual("mixer", x_BTE, parts.mixer(x_BTE)))
        if parts.layer.cross:
            x_BTE = parts.norm("cross_norm", parts.residual("cross", x_BTE, parts.cross(x_BTE)))
        return parts.norm("feedforward_norm", parts.residual("feedforward", x_BTE, parts.feedforward(x_BTE)))

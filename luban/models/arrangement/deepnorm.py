"""DeepNorm (Wang et al. 2022, DeepNet, section 3): norm(α·x + mixer(x)), then norm(α·x + feedforward(x)).

For a decoder or encoder of N layers α = (2N)^¼, and values, attention's output and the feed-forward weights start
β = (8N)^−¼ times smaller, so that updates stay bounded at any depth (table of section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext
from luban.nn.linear import Projection
from luban.nn.mixer.base import LayerShape

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec


class DeepNormBlock(Block):
    """One layer. Its weights carry the gain β, which initialisations multiply by."""

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__(layer, shape)
        self.alpha = (2 * shape.layers) ** 0.25
        for projection in self.modules():
            if isinstance(projection, Projection) and projection.parameter_roles["weight"] not in ("q", "k", "router"):
                projection.init_gain = (8 * shape.layers) ** -0.25

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.mixer_norm(self.alpha * x_BTE + self.run_mixer(x_BTE, ctx))
        return self.feedforward_norm(self.alpha * x_BTE + self.run_feedforward(x_BTE, ctx))


@dataclass(frozen=True, kw_only=True)
class DeepNorm(Arrangement):
    """Post-norm with a larger weight on the residual. Choose `init.scale_residual = false` with it: β takes its place."""

    block = DeepNormBlock
    final_norm = False

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """norm(α·x + mixer(x)), then norm(α·x + feedforward(x))."""
        x_BTE = parts.norm("mixer_norm", parts.residual("mixer", x_BTE, parts.mixer(x_BTE)))
        return parts.norm("feedforward_norm", parts.residual("feedforward", x_BTE, parts.feedforward(x_BTE)))

"""Sandwich norm (CogView, Ding et al. 2021, section 3.2): x + norm(mixer(norm(x))), then the same with feed-forward."""

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


class SandwichNormBlock(Block):
    """One layer; what each part adds to the residual is normalised too, so it can't grow without bound."""

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__(layer, shape)
        self.mixer_output_norm = layer.norm.build(shape.width)
        self.feedforward_output_norm = layer.norm.build(shape.width)

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = x_BTE + self.mixer_output_norm(self.run_mixer(self.mixer_norm(x_BTE), ctx))
        return x_BTE + self.feedforward_output_norm(self.run_feedforward(self.feedforward_norm(x_BTE), ctx))


@dataclass(frozen=True, kw_only=True)
class SandwichNorm(Arrangement):
    """A norm before and a norm behind each part."""

    block = SandwichNormBlock

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """x + norm(mixer(norm(x))), then the same with feed-forward."""
        mixed = parts.norm("mixer_output_norm", parts.mixer(parts.norm("mixer_norm", x_BTE)))
        x_BTE = parts.residual("mixer", x_BTE, mixed)
        made = parts.norm("feedforward_output_norm", parts.feedforward(parts.norm("feedforward_norm", x_BTE)))
        return parts.residual("feedforward", x_BTE, made)

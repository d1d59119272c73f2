"""DeepNorm (Wang et al. 2022, DeepNet, section 3): norm(α·x + attention(x)), then norm(α·x + feedforward(x)).

For a decoder or encoder of N layers α = (2N)^¼, and values, attention's output and the feed-forward products begin
β = (8N)^−¼ times smaller, so that updates stay bounded at any depth (table of section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from luban.models.block.serial import Serial, SerialBlock
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class DeepNormBlock(SerialBlock):
    """One layer. Its dense layers carry the gain β, which initialisations multiply by."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.alpha = (2 * spec.layers) ** 0.25
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and name not in ("attention.q", "attention.k"):
                layer.gain = (8 * spec.layers) ** -0.25

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.attention_norm(self.alpha * x_BTE + self.attention(x_BTE, frame, position, layer))
        return self.feedforward_norm(self.alpha * x_BTE + self.feedforward(x_BTE))


@dataclass(frozen=True, kw_only=True)
class DeepNorm(Serial):
    """Post-norm with a heavier stream. Choose `init.scale_residual = false` with it: β takes its place."""

    module = DeepNormBlock
    final_norm = False

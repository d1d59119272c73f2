"""DoRA: a LoRA that changes directions, and a magnitude of each output (Liu et al. 2024, equation 5).

I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from luban.adapters.lora import LoRA, LowRank
from luban.adapters.placement import Place
from luban.nn.init import InitialValues
from luban.nn.linear import Projection
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """m·(W + s·B·A) / ‖W + s·B·A‖ by rows, the norm taken as a constant in the backward pass (section 4.3)."""

    def build(self, place: Place) -> Directional:
        """The module for a projection."""
        self.require_rank(place)
        return Directional(place.target.in_features, place.target.out_features, self)


class Directional(LowRank):
    """Parameters: R·(I + O) + O."""

    parameter_roles: ClassVar[dict[str, Role]] = {"a": "adapter", "b": "adapter", "magnitude": "position"}
    reads_output = reads_weight = True

    def __init__(self, inputs: int, outputs: int, config: LoRA):
        super().__init__(inputs, outputs, config)
        self.magnitude = nn.Parameter(torch.empty(outputs))

    def draw_parameters(self, draw: InitialValues) -> None:
        """As in LoRA; magnitudes are set from the weight."""
        super().draw_parameters(draw)
        self.magnitude.fill_(1.0)

    def values_from(self, weights: Mapping[str, Tensor], place: str) -> None:
        """Magnitudes: the norms of the weight's rows."""
        self.magnitude.copy_(weights[f"{place}.weight"].float().norm(dim=1))

    def product(self) -> None:
        """None: it scales what the projection gives, too."""
        return None

    def gains(self, weight_OI: Tensor) -> Tensor:
        """m/‖W + s·B·A‖, (O,)."""
        with torch.no_grad():
            norm_O = (weight_OI + (self.b @ self.a) * self.scale).norm(dim=1)
        return self.magnitude / norm_O

    def forward(self, x: Tensor, y: Tensor, projection: Projection) -> Tensor:  # type: ignore[override]
        """Input (…, I) and the projection's output (…, O) → (…, O)."""
        gains_O, low = self.gains(projection.weight), super().forward(x)
        if projection.bias is None:
            return gains_O * (y + low)
        return gains_O * (y - projection.bias + low) + projection.bias

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """m·(W + s·B·A) / ‖W + s·B·A‖."""
        return self.gains(weight_OI)[:, None] * (weight_OI + self.delta()), bias_O

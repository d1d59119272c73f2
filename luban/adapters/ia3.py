"""(IA)³: learned scales of keys, values and the inner activations of feed-forward networks (Liu et al. 2022, section 3.3).

I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, ProjectionAdapter
from luban.adapters.placement import Place, chosen_places
from luban.nn.linear import Projection
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class IA3(ProjectionAdapter):
    """One scale for each output of k and v, one for each input of down. They start at 1."""

    peft = "IA3"
    targets: tuple[str, ...] = ("k", "v", "down")  # roles or patterns; the inputs of down are scaled, outputs of others

    def places(self, model: nn.Module) -> list[Place]:
        """Those of `targets`; in a gated network the scale of down's input is one of up's output."""
        chosen = chosen_places(model, self.targets, given=self.targets != type(self).targets)
        return [_before_gate(place) for place in chosen]

    def build(self, place: Place) -> Scale:
        """The scales."""
        inner = place.role == "down"
        return Scale(place.target.in_features if inner else place.target.out_features, of_input=inner)


def _before_gate(place: Place) -> Place:
    """act(gate) · up, scaled, is act(gate) · (up, scaled)."""
    if place.role != "down" or "up" not in place.owner.projections():
        return place
    return Place(place.name.removesuffix("down") + "up", place.owner, "up")


class Scale(Adapter):
    """Scales of outputs (O,) or inputs (I,)."""

    parameter_roles: ClassVar[dict[str, Role]] = {"scale": "position"}
    reads_output = True

    def __init__(self, size: int, *, of_input: bool):
        super().__init__()
        self.of_input = self.reads_weight = of_input
        self.scale = nn.Parameter(torch.empty(size))

    def draw_parameters(self, draw) -> None:
        """Ones."""
        self.scale.fill_(1.0)

    def forward(self, x: Tensor, y: Tensor, projection: Projection) -> Tensor:
        """Input (…, I) and output (…, O) of the projection → (…, O)."""
        if not self.of_input:
            return y * self.scale
        return y + F.linear(x * (self.scale - 1), projection.weight)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows, with the bias, or columns times their scales."""
        if self.of_input:
            return weight_OI * self.scale, bias_O
        return weight_OI * self.scale[:, None], None if bias_O is None else bias_O * self.scale

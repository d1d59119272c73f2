"""Dense layers, and which of them write into the residual stream."""

from __future__ import annotations

from torch import nn


def residual_linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A dense layer whose output is added to the residual stream; initialisations may scale it by depth."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.writes_residual = True
    return layer

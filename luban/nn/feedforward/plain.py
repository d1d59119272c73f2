"""down(activation(up(x))) (Vaswani et al. 2017, equation 2), with GELU or ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from luban.nn.context import LayerContext
from luban.nn.feedforward.base import Activation, FeedForward
from luban.nn.linear import Linear
from luban.nn.mixer.base import LayerShape


@dataclass(frozen=True, kw_only=True)
class Plain(FeedForward):
    """Two matmuls around an activation."""

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return PlainFeedForward(shape.width, self.width, self.bias, type(self).activation)


class PlainFeedForward(nn.Module):
    """The network as a module of two linear maps."""

    def __init__(self, width: int, inner: int, bias: bool, activation: Activation):
        super().__init__()
        self.activation = activation
        self.up = Linear(width, inner, bias=bias, role="up")
        self.down = Linear(inner, width, bias=bias, role="down", writes_residual=True)

    def forward(self, x_BTE: Tensor, ctx: LayerContext | None = None) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.down(self.activation(self.up(x_BTE)))


@dataclass(frozen=True, kw_only=True)
class GELU(Plain):
    """Exact GELU (Hendrycks & Gimpel 2016)."""

    activation = staticmethod(F.gelu)


@dataclass(frozen=True, kw_only=True)
class TanhGELU(Plain):
    """GELU by its tanh approximation, as GPT-2 computed it."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))


@dataclass(frozen=True, kw_only=True)
class ReLU(Plain):
    """ReLU (Vaswani et al. 2017)."""

    input_kept = False
    activation = staticmethod(F.relu)

"""down(activation(gate(x)) · up(x)) (Shazeer 2020, equation 6).

N rows, E model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.nn.context import LayerContext
from luban.nn.feedforward.base import Activation, FeedForward
from luban.nn.int8 import Int8Weight, PackedKind
from luban.nn.linear import TORCH, MatmulOwner, Projection, joined, multiplies_joined
from luban.nn.mixer.base import LayerShape


@dataclass(frozen=True, kw_only=True)
class Gated(FeedForward):
    """Three matmuls, one of which gates another."""

    gated = True

    def build(self, shape: LayerShape) -> nn.Module:
        """The module."""
        return GatedFeedForward(shape.width, self.width, self.bias, type(self).activation)


class GatedFeedForward(nn.Module, MatmulOwner):
    """Owns gate, up and down, so that SwiGLU can be computed inside the matmuls around it.

    In training on a GPU the inner activation is never kept: the backward pass computes it again together with its
    gradient. Inference on a GPU uses the same kernel where gate and up lie one after another (`luban.nn.linear.lay_adjacent`).
    """

    def __init__(self, width: int, inner: int, bias: bool, activation: Activation):
        super().__init__()
        self.init_matmul()
        self.activation, self.inner = activation, inner
        self.gate = Projection(width, inner, bias=bias, role="gate")
        self.up = Projection(width, inner, bias=bias, role="up")
        self.down = Projection(inner, width, bias=bias, role="down", writes_residual=True)

    def projections(self) -> Mapping[str, Projection]:
        """Gate, up and down."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def joint_projections(self) -> tuple[Projection, ...]:
        """Gate and up."""
        return self.gate, self.up

    def forward(self, x_BTE: Tensor, ctx: LayerContext | None = None) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        if self.packed is not None:
            sizes = {"gate": self.inner, "up": self.inner}
            gate, up = self.add_adapters(self.packed["gate_up"](x_BTE), x_BTE, sizes).chunk(2, -1)
            inner = self.activation(gate) * up
            return self.plus_adapter("down", self.packed["down"](inner), inner)
        swish = self.activation is F.silu and self.down.bias is None
        if swish and multiplies_joined(x_BTE, self.gate, self.up):
            return self._fused(x_BTE.flatten(0, -2)).unflatten(0, x_BTE.shape[:-1])
        gate, up = self._linear("gate", x_BTE), self._linear("up", x_BTE)
        return self._linear("down", self.activation(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        projection: Projection = self._modules[name]  # type: ignore[assignment]
        return self.multiply(x, {name: projection.weight.shape[0]}, projection.weight, projection.bias)

    def _fused(self, x_NE: Tensor) -> Tensor:
        """The same, (N, E) → (N, E), with SwiGLU and its gradient in kernels; without biases and adapters they can run
        inside the matmuls."""
        from luban.kernels import gated
        from luban.kernels.swiglu import swiglu, swiglu_linear

        gate, up, down = self.gate.weight, self.up.weight, self.down.weight
        alone = not self.adapted and self.gate.bias is None
        if alone and self.matmul is not TORCH and self.matmul.supports_swiglu(gate.shape[1], gate.shape[0]):
            return self.matmul.swiglu(x_NE, joined(self.gate, self.up)[0], down)
        here = x_NE.device.type, x_NE.dtype, gate.dtype
        training = torch.is_grad_enabled()
        if training and alone and self.matmul is TORCH and gated.picked(*here, *gate.shape, *down.shape):
            return gated.gated_matmuls(x_NE, gated.paired(gate, up), down)[0]
        gate_up = self.multiply(x_NE, {"gate": gate.shape[0], "up": up.shape[0]}, *joined(self.gate, self.up))
        if training and self.matmul is TORCH and (self.adapters is None or "down" not in self.adapters):
            return swiglu_linear(gate_up, down)
        return self._linear("down", swiglu(gate_up))

    def pack(self, kind: PackedKind = Int8Weight) -> None:
        """Replace the weights by packed ones; gate and up are concatenated."""
        self.packed = nn.ModuleDict(
            {"gate_up": kind(*joined(self.gate, self.up)), "down": kind(self.down.weight, self.down.bias)}
        )
        for projection in self.projections().values():
            projection.drop_parameters()


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Gated):
    """Gated by SiLU (Shazeer 2020)."""

    activation = staticmethod(F.silu)

    @property
    def recomputed(self) -> bool:
        """True if there is no bias (`GatedFeedForward.forward`)."""
        return not self.bias


@dataclass(frozen=True, kw_only=True)
class GEGLU(Gated):
    """Gated by exact GELU (Shazeer 2020)."""

    activation = staticmethod(F.gelu)


@dataclass(frozen=True, kw_only=True)
class TanhGEGLU(Gated):
    """Gated by GELU's tanh approximation, as T5 1.1 computes it."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))

"""The position-wise network of a block: two products around an activation, or three with a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op
from luban.core.registry import Registry, Variant
from luban.nn.linear import Dense, joint, parallel, residual_linear, trains_fused

Activation = Callable[[Tensor], Tensor]
Products = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (N, E), (2I, E) gates first, (O, I) → (N, O) with SwiGLU between


@dataclass(frozen=True, kw_only=True)
class FeedForward(Variant):
    """A family of feed-forward networks."""

    registry: ClassVar[Registry] = Registry(
        "feed-forward",
        {
            "swiglu": "luban.nn.feedforward:SwiGLU",
            "geglu": "luban.nn.feedforward:GEGLU",
            "geglu_tanh": "luban.nn.feedforward:TanhGEGLU",
            "gelu": "luban.nn.feedforward:GELU",
            "gelu_tanh": "luban.nn.feedforward:TanhGELU",
            "relu": "luban.nn.feedforward:ReLU",
        },
    )
    activation: ClassVar[Activation]
    gated: ClassVar[bool] = False
    input_kept: ClassVar[bool] = True  # the activation's gradient needs what went into it, not what came out
    width: int = 768  # inner width
    bias: bool = False  # biases on every product

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"feed-forward width must be at least 1, {self.width} given")

    def build(self, width: int) -> nn.Module:
        """The module for a model of `width`."""
        kind = GatedFeedForward if self.gated else PlainFeedForward
        return kind(width, self.width, self.bias, type(self).activation)

    def ops(self, tokens: int, width: int) -> list[Op]:
        """Its products and activation over `tokens` rows."""
        names = ("gate", "up") if self.gated else ("up",)
        inner = [linear_op(name, tokens, width, self.width, bias=self.bias, keeps=self.input_kept) for name in names]
        product = Op(name="activation", kind="activation", activation=tokens * self.width)
        return [*inner, product, linear_op("down", tokens, self.width, width, bias=self.bias)]


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020, eq. 6)."""

    joined: ClassVar[tuple[str, ...]] = ("gate", "up")  # dense layers with one input

    def __init__(self, width: int, inner: int, bias: bool, activation: Activation):
        super().__init__()
        self.activation = activation
        self.gate = Dense(width, inner, bias=bias)
        self.up = Dense(width, inner, bias=bias)
        self.fused: nn.Module | None = None  # gate and up at once, where weights were packed for inference
        self.keeps_inner = True  # from the forward to the backward pass; a recomputation policy says no
        self.products: Products | None = None  # a precision policy's own
        self.down = residual_linear(inner, width, bias=bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        if trains_fused(x_BTE) and self.activation is F.silu and self.down.bias is None:
            out = self._with_kernels(x_BTE.flatten(0, -2))
            if out is not None:
                return out.unflatten(0, x_BTE.shape[:-1])
        gate, up = self.fused(x_BTE).chunk(2, -1) if self.fused else parallel(x_BTE, self.gate, self.up)
        return self.down(self.activation(gate) * up)

    def _with_kernels(self, x_NE: Tensor) -> Tensor | None:
        """The same with SwiGLU and its gradient in kernels of ours or in the products themselves; None where products are
        others than torch's and bring no such."""
        from luban.kernels import gated
        from luban.kernels.swiglu import LeanProduct, swiglu

        gate, up, down = self.gate.weight, self.up.weight, self.down.weight
        if self.gate.bias is None and self.products is not None:
            return self.products(x_NE, torch.cat([gate, up]), down)
        if not self.down.plain:
            return None
        here = x_NE.device.type, x_NE.dtype, gate.dtype
        if self.gate.bias is None and gated.serves(*here, *gate.shape, *down.shape):
            return gated.gated_products(x_NE, gated.paired(gate, up), down)[0]
        gate_up = joint(x_NE, self.gate, self.up)
        return self.down(swiglu(gate_up)) if self.keeps_inner else LeanProduct.apply(gate_up, down)


class PlainFeedForward(nn.Module):
    """down(activation(up(x))) (Vaswani et al. 2017, eq. 2)."""

    def __init__(self, width: int, inner: int, bias: bool, activation: Activation):
        super().__init__()
        self.activation = activation
        self.up = Dense(width, inner, bias=bias)
        self.down = residual_linear(inner, width, bias=bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.down(self.activation(self.up(x_BTE)))


@dataclass(frozen=True, kw_only=True)
class SwiGLU(FeedForward):
    """Gated by SiLU (Shazeer 2020)."""

    activation = staticmethod(F.silu)
    gated = True


@dataclass(frozen=True, kw_only=True)
class GEGLU(FeedForward):
    """Gated by exact GELU (Shazeer 2020)."""

    activation = staticmethod(F.gelu)
    gated = True


@dataclass(frozen=True, kw_only=True)
class TanhGEGLU(FeedForward):
    """Gated by GELU's tanh approximation, as T5 1.1 computes it."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))
    gated = True


@dataclass(frozen=True, kw_only=True)
class GELU(FeedForward):
    """Exact GELU (Hendrycks & Gimpel 2016)."""

    activation = staticmethod(F.gelu)


@dataclass(frozen=True, kw_only=True)
class TanhGELU(FeedForward):
    """GELU by its tanh approximation, as GPT-2 computed it."""

    activation = staticmethod(partial(F.gelu, approximate="tanh"))


@dataclass(frozen=True, kw_only=True)
class ReLU(FeedForward):
    """ReLU (Vaswani et al. 2017)."""

    input_kept = False
    activation = staticmethod(F.relu)

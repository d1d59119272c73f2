"""Normalisation over the last axis, the model width E."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant
from luban.kernels.available import infers_fused
from luban.nn.roles import Role
from luban.nn.row import infers_row, row_rms_norm


@dataclass(frozen=True, kw_only=True)
class Norm(Variant):
    """Base config of normalisation layers (registry `norm`)."""

    registry: ClassVar[Registry] = Registry(
        "norm", {"layernorm": "luban.nn.norm:LayerNorm", "rmsnorm": "luban.nn.norm:RMSNorm"}
    )
    eps: float = 1e-5  # added to the variance

    def __post_init__(self):
        if not self.eps > 0:
            raise ConfigError(f"norm eps must be positive, {self.eps} given")

    def parameters(self, width: int) -> int:
        """Number of scalars of one norm."""
        return width

    def build(self, width: int) -> nn.Module:
        """The module, over a last axis of `width`."""
        raise NotImplementedError

    def describe(
        self, graph: GraphBuilder, name: str, x: GraphTensor, shape: tuple[int, ...] | None = None
    ) -> GraphTensor:
        """Record the norm of x over the last axis of `shape`, x's own by default. FLOPs of norms aren't counted."""
        shape = x.shape if shape is None else shape
        count = self.parameters(shape[-1])
        return graph.add(name, "norm", x, shape=shape, role="norm", parameters=count, saved_elements=x.elements)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """LayerNorm (Ba et al. 2016): zero mean and unit variance, then a learned scale and shift."""

    bias: bool = True  # whether there is a shift

    def parameters(self, width: int) -> int:
        """Scale, and shift where there is one."""
        return 2 * width if self.bias else width

    def build(self, width: int) -> nn.Module:
        """torch's own."""
        return nn.LayerNorm(width, eps=self.eps, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """RMSNorm (Zhang & Sennrich 2019): x / √(mean(x²) + eps) · weight."""

    def build(self, width: int) -> nn.Module:
        """A module that computes in float32 and returns the input's precision."""
        return RMSNormModule(width, self.eps)


class RMSNormModule(nn.Module):
    """RMSNorm over the last axis, computed in float32, since half-precision squares would overflow."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.parameter_roles: dict[str, Role] = {"weight": "norm"}

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same shape and precision."""
        if infers_fused(x) and type(self.weight) is nn.Parameter:
            from luban.kernels.rmsnorm import WIDEST, rms_norm

            if x.shape[-1] <= WIDEST:
                return rms_norm(x, self.weight, self.eps)
        if infers_row(x):
            return row_rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32 or x.dtype == torch.float64:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight.to(x.dtype)

"""PiSSA: LoRA that starts at the principal singular vectors of the weight (Meng et al. 2024, equations 2 to 4).

I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.adapters.lora import LoRA, LowRank
from luban.adapters.placement import Place
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class PiSSA(LoRA):
    """The frozen part is W − s·B₀·A₀ of the weight's largest R singular values. The weight itself isn't changed: the
    adapter keeps A₀ and B₀ and subtracts their product, so that step 0 leaves outputs as they were, bit for bit, and what
    is exported is a LoRA of rank 2R over the same base."""

    def build(self, place: Place) -> PrincipalLowRank:
        """The product for a projection."""
        self.require_rank(place)
        return PrincipalLowRank(place.target.in_features, place.target.out_features, self)


class PrincipalLowRank(LowRank):
    """s·(B·A − B₀·A₀)·x."""

    parameter_roles: ClassVar[dict[str, Role]] = {"a": "adapter", "b": "adapter"}
    a0: Tensor
    b0: Tensor

    def __init__(self, inputs: int, outputs: int, config: LoRA):
        super().__init__(inputs, outputs, config)
        self.register_buffer("a0", torch.empty(config.rank, inputs))
        self.register_buffer("b0", torch.empty(outputs, config.rank))

    def draw_parameters(self, draw) -> None:
        """Nothing is drawn: `values_from` sets all."""
        for tensor in (self.a, self.b, self.a0, self.b0):
            tensor.zero_()

    def values_from(self, weights: Mapping[str, Tensor], place: str) -> None:
        """A = √S·Vᵀ and B = U·√S of the R largest singular values, divided so that s·B·A is their part of the weight."""
        u, s, vt = torch.linalg.svd(weights[f"{place}.weight"].float(), full_matrices=False)
        root = (s[: self.rank] / self.scale).sqrt()
        self.a.copy_(root[:, None] * vt[: self.rank])
        self.b.copy_(u[:, : self.rank] * root)
        self.a0.copy_(self.a)
        self.b0.copy_(self.b)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        if self.dropout is not None:
            x = self.dropout(x)
        first = F.linear(F.linear(x, self.a0.to(x.dtype)) * self.scale, self.b0.to(x.dtype))
        return F.linear(F.linear(x, self.a) * self.scale, self.b) - first

    def product(self) -> None:
        """None: both products are equal at first and must cancel to the bit, which one matmul over both needn't do."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (2R, I) and B (O, 2R): the trained product less the first one."""
        return torch.cat([self.a, self.a0]), torch.cat([self.b, -self.b0], dim=1)

    def delta(self) -> Tensor:
        """s·(B·A − B₀·A₀), (O, I)."""
        return (self.b @ self.a - self.b0 @ self.a0) * self.scale

"""LoRA: W + s·B·A beside a frozen weight (Hu et al. 2022, equation 3), s = α/r or, rank-stabilised, α/√r (Kalajdzievski
2023, theorem 3.2); LoRA+ trains B at a higher rate than A (Hayou et al. 2024).

I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, ProjectionAdapter
from luban.adapters.placement import Place
from luban.core.errors import ConfigError
from luban.nn.init import InitialValues
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class LoRA(ProjectionAdapter):
    """A product of two narrow matrices added to each weight; B starts at zero, so that step 0 changes nothing."""

    peft = "LORA"
    rank: int = 8  # R, of the products
    alpha: float = 16.0  # α: the product is scaled by α/R
    rank_stabilised: bool = False  # scale by α/√R instead (rsLoRA)
    dropout: float = 0.0  # share of the inputs that the product doesn't see in training
    init: Literal["kaiming", "gaussian"] = "kaiming"  # of A: uniform within ±1/√I, or normal with deviation 1/R
    rate_ratio: float = 1.0  # learning rate of B over that of A (LoRA+: 2 to 16)

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"adapter.rank must be at least 1, {self.rank} given")
        if not self.alpha > 0:
            raise ConfigError(f"adapter.alpha must be above 0, {self.alpha} given")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout must lie in [0, 1), {self.dropout} given")
        if not self.rate_ratio > 0:
            raise ConfigError(f"adapter.rate_ratio must be above 0, {self.rate_ratio} given")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def build(self, place: Place) -> LowRank:
        """The product for a projection. Raises ConfigError for a rank above its width."""
        self.require_rank(place)
        return LowRank(place.target.in_features, place.target.out_features, self)

    def require_rank(self, place: Place) -> None:
        """Raise ConfigError for a rank above the projection's inputs or outputs."""
        inputs, outputs = place.target.in_features, place.target.out_features
        if self.rank > min(inputs, outputs):
            raise ConfigError(
                f"adapter.rank {self.rank} is above the width of {place.name} ({outputs} × {inputs}): "
                f"at most {min(inputs, outputs)}"
            )


class LowRank(Adapter):
    """s·B·A·x. Parameters: R·(I + O)."""

    parameter_roles: ClassVar[dict[str, Role]] = {"a": "adapter", "b": "adapter"}

    def __init__(self, inputs: int, outputs: int, config: LoRA):
        super().__init__()
        self.scale, self.init, self.rank = config.scale, config.init, config.rank
        self.a = nn.Parameter(torch.empty(config.rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, config.rank))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None
        self.rates = {"b": config.rate_ratio} if config.rate_ratio != 1 else {}

    def draw_parameters(self, draw: InitialValues) -> None:
        """A as `init` says, B zero."""
        normal = draw.normal("a", self.a, 1.0)
        if self.init == "gaussian":
            self.a.copy_(normal / self.rank)
        else:  # the normal numbers' distribution function makes them uniform
            self.a.copy_(torch.erf(normal / math.sqrt(2)) / math.sqrt(self.a.shape[1]))
        self.b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        if self.dropout is not None:
            x = self.dropout(x)
        return F.linear(F.linear(x, self.a) * self.scale, self.b)

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s where the output is no more than s·B·A·x; None while inputs are dropped."""
        return None if self.dropout is not None and self.training else (self.a, self.b, self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R', I) and B (O, R') whose product, times s, is what the module adds to the weight."""
        return self.a, self.b

    def delta(self) -> Tensor:
        """s·B·A, (O, I)."""
        return (self.b @ self.a) * self.scale

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s·B·A."""
        return weight_OI + self.delta().to(weight_OI.dtype), bias_O

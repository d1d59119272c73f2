"""Down to a narrow width, an activation, up again: the module of series and parallel adapters.

E width, M narrow width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig
from luban.core.errors import ConfigError
from luban.nn.init import InitialValues
from luban.nn.roles import Role

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Base config of adapters that are such modules."""

    width: int = 64  # M, of the bottleneck
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"  # inside the bottleneck
    scale: float = 1.0  # factor on the bottleneck's output

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"adapter.width must be at least 1, {self.width} given")


class Bottleneck(Adapter):
    """s·(U·act(D·x + d) + u), (…, E) → (…, E). Parameters: 2·E·M + M + E. U and u start at zero, so that step 0 changes
    nothing (Houlsby et al. start near zero)."""

    parameter_roles: ClassVar[dict[str, Role]] = {
        "down": "adapter",
        "down_bias": "bias",
        "up": "adapter",
        "up_bias": "bias",
    }

    def __init__(self, width: int, config: BottleneckConfig):
        super().__init__()
        self.activation, self.scale = ACTIVATIONS[config.activation], config.scale
        self.down, self.down_bias = (
            nn.Parameter(torch.empty(config.width, width)),
            nn.Parameter(torch.empty(config.width)),
        )
        self.up, self.up_bias = nn.Parameter(torch.empty(width, config.width)), nn.Parameter(torch.empty(width))

    def draw_parameters(self, draw: InitialValues) -> None:
        """D normal with deviation 1/√E, all else zero."""
        self.down.copy_(draw.normal("down", self.down, 1 / math.sqrt(self.down.shape[1])))
        for parameter in (self.down_bias, self.up, self.up_bias):
            parameter.zero_()

    def bottleneck(self, x: Tensor) -> Tensor:
        """(…, E) → (…, E)."""
        inner = self.activation(F.linear(x, self.down, self.down_bias))
        return F.linear(inner, self.up, self.up_bias) * self.scale

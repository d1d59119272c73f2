"""Sinusoidal positions (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.base import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Position):
    """Adds PE(p, 2i) = sin(p / base^(2i/E)) and PE(p, 2i+1) = cos of the same to the token embeddings."""

    embeds = True
    base: float = 10_000.0  # the longest wavelength is base·2π
    scale_embedding: bool = True  # multiply the token embeddings by √E first (section 3.4)

    def check(self, shape: PositionShape) -> None:
        """Sines and cosines come in pairs."""
        if shape.width % 2:
            raise ConfigError(f"sinusoidal positions need an even width, {shape.width} given")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return SinusoidalPositions(self, shape)


class SinusoidalPositions(PositionMethod):
    """Computes the rows that a batch needs."""

    def __init__(self, config: Sinusoidal, shape: PositionShape):
        super().__init__()
        self.base, self.width = config.base, shape.width
        self.scale = math.sqrt(shape.width) if config.scale_embedding else 1.0

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """(B, T, E) with the waves added."""
        powers = torch.arange(0, self.width, 2, device=x_BTE.device, dtype=torch.float32) / self.width
        angles = positions_BT.float()[..., None] * self.base**-powers
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x_BTE * self.scale + waves.to(x_BTE.dtype)

"""Rotary positions (Su et al. 2021, RoFormer, eq. 34), whole or partial width, in both pairing conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.family import Position, PositionMethod, PositionShape
from luban.nn.position.scaling import RotaryScaling

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rope(Position):
    """Rotates pair i of a head by the angle position · base^(−2i/width)."""

    base: float = 10_000.0  # the slowest pair turns once in about base·2π tokens
    width: int | None = None  # leading dimensions of a head that are rotated; none: all
    pairing: Literal["half", "interleaved"] = "half"  # (i, i + width/2) as NeoX and LLaMA's HF files, or (2i, 2i + 1)
    scaling: RotaryScaling | None = None  # for contexts longer than trained on

    def rotated(self, shape: PositionShape) -> int:
        """How many dimensions of a head are rotated."""
        return shape.head_dim if self.width is None else self.width

    def check(self, shape: PositionShape) -> None:
        """Pairs need an even width no larger than the head."""
        rotated = self.rotated(shape)
        if rotated % 2 or not 0 < rotated <= shape.head_dim:
            raise ConfigError(f"rotary width {rotated} must be even and at most the head width {shape.head_dim}")
        if not self.base > 1:
            raise ConfigError(f"rotary base must be larger than 1, {self.base} given")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        method = RotaryPositions(self, self.rotated(shape))
        whole = method.rotated == shape.head_dim and self.pairing == "half"
        method.turns_packed = whole and shape.head_dim & (shape.head_dim - 1) == 0  # its tiles are powers of two
        return method


class RotaryPositions(PositionMethod):
    """Rotates queries and keys in float32, whatever the model's precision."""

    def __init__(self, config: Rope, rotated: int):
        super().__init__()
        self.config, self.rotated = config, rotated

    def turn_packed(self, packed_BTP: Tensor, tables: Tables, heads: int, key_heads: int) -> tuple[Tensor, ...]:
        """Both rotated while they are taken apart."""
        from luban.kernels.rotary import rotate_packed

        return rotate_packed(packed_BTP, *tables, heads, key_heads)

    def tables(self, positions_BT: Tensor) -> Tables:
        """Cosines and sines (B, 1, T, rotated) of these positions."""
        return rotary_tables(self.config, positions_BT, self.rotated)

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Both rotated by the same angles."""
        return self.rotate(q_BHTD, tables), self.rotate(k_BKTD, tables)

    def rotate(self, x_BHTD: Tensor, tables: Tables) -> Tensor:
        """(B, H, T, D) rotated in its leading `rotated` dimensions."""
        turned, kept = x_BHTD[..., : self.rotated], x_BHTD[..., self.rotated :]
        turned = rotate_pairs(turned, *tables, self.config.pairing)
        return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def rotary_tables(config: Rope, positions_BT: Tensor, rotated: int) -> Tables:
    """Cosines and sines (B, 1, T, rotated) of these positions, in float32.

    Both members of a pair have the same cosine; the first has the sine's negative, so that turning is
    x · cos + partner(x) · sin.
    """
    powers = torch.arange(0, rotated, 2, device=positions_BT.device, dtype=torch.float32) / rotated
    frequencies = 1.0 / config.base**powers
    if config.scaling is not None:
        frequencies = config.scaling.at(positions_BT, frequencies, config.base)
    angles = positions_BT.float()[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if config.scaling is not None and config.scaling.amplitude != 1.0:
        cos, sin = cos * config.scaling.amplitude, sin * config.scaling.amplitude
    return paired(cos, cos, config.pairing), paired(-sin, sin, config.pairing)


def paired(first: Tensor, second: Tensor, pairing: str) -> Tensor:
    """(…, n) values for the first and the second member of every pair → (…, 2n) where those stand."""
    if pairing == "half":
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Turn the pairs of the last axis by the angles of `rotary_tables`."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    if pairing == "half":
        partner = wide.roll(x.shape[-1] // 2, dims=-1)
    else:
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, partner, sin).to(x.dtype)

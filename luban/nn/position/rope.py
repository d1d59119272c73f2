"""Rotary positions (Su et al. 2021, RoFormer, eq. 34), whole or partial width, in both pairing conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.kernels.available import triton_runs
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, Rotation
from luban.nn.position.scaling import RotaryScaling

CosSin = tuple[Tensor, Tensor]  # (1 or B, 1, T, rotated dimensions) float32 each


@dataclass(frozen=True, kw_only=True)
class Rope(Position):
    """Rotates pair i of a head by the angle position · base^(−2i/width)."""

    base: float = 10_000.0  # the slowest pair of channels completes a rotation in about base·2π tokens
    width: int | None = None  # leading dimensions of a head that are rotated; none: all
    pairing: Literal["half", "interleaved"] = "half"  # (i, i + width/2) as NeoX and LLaMA's HF files, or (2i, 2i + 1)
    scaling: RotaryScaling | None = None  # for contexts longer than trained on

    @property
    def by_length(self) -> bool:
        """Whether angles depend on the length of the row."""
        return self.scaling is not None and self.scaling.by_length

    def rotated(self, shape: PositionShape) -> int:
        """Number of dimensions of a head that are rotated."""
        return shape.head_dim if self.width is None else self.width

    def check(self, shape: PositionShape) -> None:
        """Raise ConfigError unless the rotated width is even and at most the head dim."""
        rotated = self.rotated(shape)
        if rotated % 2 or not 0 < rotated <= shape.head_dim:
            raise ConfigError(f"rotary width {rotated} must be even and at most the head width {shape.head_dim}")
        if not self.base > 1:
            raise ConfigError(f"rotary base must be larger than 1, {self.base} given")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return RotaryPositions(self, self.rotated(shape), shape.head_dim)


class RotaryPositions(PositionMethod):
    """Rotates queries and keys in float32, whatever the model's precision."""

    def __init__(self, config: Rope, rotated: int, head_dim: int):
        super().__init__()
        self.config, self.rotated, self.by_length = config, rotated, config.by_length
        whole = rotated == head_dim and config.pairing == "half"
        self.fused = whole and head_dim & (head_dim - 1) == 0  # the kernel's tiles are powers of two

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Rotation by angles from positions (1 or B, T); in self-attention keys have the queries' positions."""
        cos_sin = rotary_cos_sin(self.config, positions, self.rotated)
        return PositionEncoding(rotation=Rotary(cos_sin, self.config.pairing, fused=self.fused))


class Rotary(Rotation):
    """Queries and keys rotated by the same angles, in their leading dimensions.

    Args:
        cos_sin: (1 or B, 1, T, rotated dimensions) float32 each.
    """

    def __init__(self, cos_sin: CosSin, pairing: str, *, fused: bool):
        self.cos_sin, self.pairing, self.fused = cos_sin, pairing, fused

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries (B, H, T, D) and keys (B, K, T, D)."""
        return rotate(q_BHTD, self.cos_sin, self.pairing), rotate(k_BKTD, self.cos_sin, self.pairing)

    def apply_rotary_qkv(self, qkv_BTP: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, (H + 2K)·D) and rotate queries and keys together, on a GPU in one kernel."""
        if triton_runs(qkv_BTP):
            from luban.kernels.rotary import apply_rotary_qkv

            return apply_rotary_qkv(qkv_BTP, *self.cos_sin, heads, key_heads)
        cos_BT1D, sin_BT1D = (x.transpose(1, 2) for x in self.cos_sin)
        heads_BTND = qkv_BTP.unflatten(-1, (heads + 2 * key_heads, -1))
        turned_BTND = rotate_pairs(heads_BTND[:, :, : heads + key_heads], cos_BT1D, sin_BT1D, self.pairing)
        q_BTHD, k_BTKD = turned_BTND[:, :, :heads], turned_BTND[:, :, heads:]
        return q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), heads_BTND[:, :, heads + key_heads :].transpose(1, 2)


def rotate(x_BHTD: Tensor, cos_sin: CosSin, pairing: str) -> Tensor:
    """Rotate (B, H, T, D) in as many leading dimensions as there are cosines."""
    width = cos_sin[0].shape[-1]
    rotated, rest = rotate_pairs(x_BHTD[..., :width], *cos_sin, pairing), x_BHTD[..., width:]
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotary_cos_sin(config: Rope, positions_BT: Tensor, rotated: int) -> CosSin:
    """Cosines and sines (B, 1, T, rotated) of positions (B, T), in float32.

    Both members of a pair have the same cosine; the first has the sine's negative, so that rotating is
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
    """Values (…, n) of the first and of the second member of each pair → (…, 2n), in the order of the head's dimensions."""
    if pairing == "half":
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    """Rotate the pairs of the last axis of x (B, H, T, rotated) by the angles of `rotary_cos_sin`."""
    wide = x if x.dtype == cos.dtype else x.to(torch.promote_types(x.dtype, cos.dtype))
    if pairing == "half":
        partner = wide.roll(x.shape[-1] // 2, dims=-1)
    else:
        partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, partner, sin).to(x.dtype)

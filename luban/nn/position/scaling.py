"""Rotary frequencies for contexts longer than those trained on: linear, NTK-aware, dynamic, YaRN,
Llama 3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class RotaryScaling(Variant):
    """Base config of rotary frequency scaling (registry `rotary scaling`)."""

    registry: ClassVar[Registry] = Registry(
        "rotary scaling",
        {
            "linear": "luban.nn.position.scaling:Linear",
            "ntk": "luban.nn.position.scaling:NTK",
            "dynamic": "luban.nn.position.scaling:Dynamic",
            "yarn": "luban.nn.position.scaling:YaRN",
            "llama3": "luban.nn.position.scaling:Llama3",
        },
    )
    by_length: ClassVar[bool] = False  # frequencies depend on the length of the row
    factor: float  # how many times longer the context becomes

    def __post_init__(self):
        if not self.factor >= 1:
            raise ConfigError(f"a rotary scaling's factor must be at least 1, {self.factor} given")

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """(width/2,) radians a token of every pair, fastest first → those that are used."""
        raise NotImplementedError

    def at(self, positions_BT: Tensor, frequencies: Tensor, base: float) -> Tensor:
        """The same for these positions: (width/2,), or (B, 1, 1, width/2) where rows differ."""
        return self.scaled(frequencies, base)

    @property
    def amplitude(self) -> float:
        """Factor on rotated queries and keys."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(RotaryScaling):
    """Positions divided by the factor (position interpolation, Chen et al. 2023, equation 4)."""

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """All slowed down alike."""
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class NTK(RotaryScaling):
    """A base so much larger that the slowest pair slows down by the factor and the fastest not at all
    ("NTK-aware", Peng et al. 2023, YaRN, equation 16)."""

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """Pair i of n slowed down by factor^(i/(n − 1))."""
        pairs = frequencies.numel()
        if pairs < 2:
            raise ConfigError("NTK scaling needs at least two rotary pairs")
        steps = torch.arange(pairs, device=frequencies.device, dtype=torch.float32) / (pairs - 1)
        return frequencies * self.factor**-steps


@dataclass(frozen=True, kw_only=True)
class Dynamic(RotaryScaling):
    """NTK-aware with a factor that grows with the text: none within the trained context, `factor` · length / context −
    (`factor` − 1) beyond it ("Dynamic NTK", Peng et al. 2023, section 3.3; transformers' form).

    The length of a row is its largest position + 1 in this forward. With a cache keys stay as they were rotated when
    they were read, as in transformers, so beyond the trained context a step differs a little from the whole.
    """

    by_length: ClassVar[bool] = True
    original: int  # tokens of the trained context

    def at(self, positions_BT: Tensor, frequencies: Tensor, base: float) -> Tensor:
        """Every row by its own length, so that rows of a batch don't change one another."""
        pairs = frequencies.numel()
        if pairs < 2:
            raise ConfigError("dynamic NTK scaling needs at least two rotary pairs")
        length_B = (positions_BT.amax(dim=-1).float() + 1).clamp_min(self.original)
        growth_B = self.factor * length_B / self.original - (self.factor - 1)
        steps = torch.arange(pairs, device=frequencies.device, dtype=torch.float32) / (pairs - 1)
        return frequencies * growth_B[:, None, None, None] ** -steps


@dataclass(frozen=True, kw_only=True)
class YaRN(RotaryScaling):
    """Pairs that rotate often within the trained context stay, those that rotate rarely slow down by the factor,
    between them a ramp; scores grow with the logarithm of the factor (Peng et al. 2023, sections 3.2 to 3.4)."""

    original: int  # tokens of the trained context
    fast: float = 32.0  # pairs that rotate at least this often in it stay as they are
    slow: float = 1.0  # pairs that rotate at most this often in it are slowed down by the factor
    attention: float | None = None  # the amplitude; none: 0.1·ln(factor) + 1
    rounded: bool = True  # whether the ramp begins and ends at whole pairs, as in the released code

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """The ramp runs over the index of the pair."""
        pairs = frequencies.numel()

        def pair_rotating(rotations: float) -> float:
            return pairs * math.log(self.original / (rotations * 2 * math.pi)) / math.log(base)

        low, high = pair_rotating(self.fast), pair_rotating(self.slow)
        if self.rounded:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        index = torch.arange(pairs, device=frequencies.device, dtype=torch.float32)
        slowed = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequencies * (1 - slowed) + frequencies / self.factor * slowed

    @property
    def amplitude(self) -> float:
        """√(1/t) of equation 22, for queries and keys alike."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention is None else self.attention


@dataclass(frozen=True, kw_only=True)
class Llama3(RotaryScaling):
    """As Llama 3.1: long wavelengths slowed down by the factor, short ones kept, between them a blend
    (the released code)."""

    original: int = 8192  # tokens of the trained context
    low: float = 1.0  # wavelengths longer than original/low are slowed down
    high: float = 4.0  # wavelengths shorter than original/high stay

    def __post_init__(self):
        super().__post_init__()
        if not self.high > self.low > 0:
            raise ConfigError(f"llama3 scaling needs high > low > 0, {self.high} and {self.low} given")

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """The blend is linear in the number of rotations within the trained context."""
        rotations = self.original * frequencies / (2 * math.pi)
        kept = ((rotations - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * kept + frequencies / self.factor * (1 - kept)

"""Initialisation: every parameter a pure function of the seed and its own name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.core.seeding import derive
from luban.nn.linear import Projection

Draw = Callable[[str, torch.Size], Tensor]  # a parameter's name in its module and its shape → standard normal numbers


@runtime_checkable
class DrawsParameters(Protocol):
    """A module with an initialisation of its own."""

    def draw_parameters(self, draw: Draw) -> None:
        """Set the parameters that it owns itself, in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class Initialisation(Variant):
    """A family of initialisations of linear layers and embeddings."""

    registry: ClassVar[Registry] = Registry(
        "initialisation",
        {
            "normal": "luban.nn.init:NormalInit",
            "fan_in": "luban.nn.init:FanInInit",
            "xavier": "luban.nn.init:XavierInit",
        },
    )
    scale_residual: bool = True  # divide by √(2·layers) what writes into the residual stream (GPT-2)

    def linear_std(self, layer: Projection) -> float:
        """Standard deviation of a projection's weights."""
        raise NotImplementedError

    def embedding_std(self, width: int) -> float:
        """Standard deviation of an embedding table."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NormalInit(Initialisation):
    """One standard deviation for all (GPT-2: 0.02)."""

    std: float = 0.02  # of linear layers and embeddings

    def __post_init__(self):
        if not self.std > 0:
            raise ConfigError(f"initialisation std must be positive, {self.std} given")

    def linear_std(self, layer: Projection) -> float:
        """The same for all."""
        return self.std

    def embedding_std(self, width: int) -> float:
        """The same for all."""
        return self.std


@dataclass(frozen=True, kw_only=True)
class FanInInit(Initialisation):
    """1/√inputs for linear layers, so that widths keep the variance; a fixed one for embeddings."""

    embedding: float = 0.02  # standard deviation of embedding tables

    def linear_std(self, layer: Projection) -> float:
        """1/√inputs."""
        return layer.in_features**-0.5

    def embedding_std(self, width: int) -> float:
        """A fixed one."""
        return self.embedding


@dataclass(frozen=True, kw_only=True)
class XavierInit(Initialisation):
    """√(2 / (inputs + outputs)) for linear layers (Glorot & Bengio 2010, equation 12); a fixed one for embeddings."""

    embedding: float = 0.02  # standard deviation of embedding tables

    def linear_std(self, layer: Projection) -> float:
        """Between inputs and outputs."""
        return math.sqrt(2 / (layer.in_features + layer.out_features))

    def embedding_std(self, width: int) -> float:
        """A fixed one."""
        return self.embedding


@torch.no_grad()
def initialise(model: nn.Module, how: Initialisation, *, layers: int, seed: int) -> None:
    """Fill every parameter of `model` in place, drawn in float32 on the CPU from (seed, parameter name), one at a time.

    The values don't depend on device, precision, or on which other parameters there are. Projections and
    embeddings follow `how` (times a projection's own `init_gain`), biases are 0, norms are the identity; a module with a
    `draw_parameters(draw)` of its own is asked, where `draw(name, shape)` gives standard normal numbers. A parameter that
    two modules share is drawn for the first.

    Args:
        layers: of the model, for `scale_residual`.
    """
    drawn: set[int] = set()
    for prefix, module in model.named_modules():
        fresh = {id(parameter) for parameter in module.parameters(recurse=False)} - drawn
        if not fresh:
            continue
        drawn |= fresh

        def draw(name: str, shape: torch.Size, prefix: str = prefix) -> Tensor:
            generator = torch.Generator().manual_seed(derive(seed, f"{prefix}.{name}"))
            return torch.randn(shape, generator=generator)

        if isinstance(module, DrawsParameters):
            module.draw_parameters(draw)
        elif isinstance(module, Projection):
            std = how.linear_std(module) * module.init_gain
            if how.scale_residual and module.writes_residual:
                std /= math.sqrt(2 * layers)
            if id(module.weight) in fresh:
                module.weight.copy_(draw("weight", module.weight.shape).mul_(std))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(draw("weight", module.weight.shape).mul_(how.embedding_std(module.embedding_dim)))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(1.0 if name == "weight" else 0.0)

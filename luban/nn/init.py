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

BLOCK = 1 << 16  # numbers drawn from one seed, so that a part of a parameter needs only the blocks it lies in
Region = Callable[
    [Tensor], tuple[Tensor, tuple[int, ...]]
]  # a tensor → what of it lies here, and where that begins in it


@runtime_checkable
class DrawsParameters(Protocol):
    """A module with an initialisation of its own."""

    def draw_parameters(self, draw: InitialValues) -> None:
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


def whole(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The region of a tensor that lies in one place."""
    return tensor, (0,) * tensor.dim()


@dataclass(frozen=True)
class InitialValues:
    """Values for the parameters of one module, each laid out (dtype, device, sharding) as the parameter they are for."""

    seed: int  # of the run
    prefix: str  # the module's name
    region: Region = whole  # which part of a parameter lies in this process

    def normal(self, name: str, parameter: Tensor, std: float) -> Tensor:
        """Normal numbers of mean 0 for the parameter `name` of the module, of at least one dimension.

        Number by number they depend on seed, name, and the place in the parameter alone, so that its shards hold what the
        whole would. They are drawn in float32 on the CPU, in blocks of rows of about BLOCK numbers, and rounded once.
        """
        values, seed = torch.empty_like(parameter), derive(self.seed, f"{self.prefix}.{name}")
        local, begins = self.region(values)
        if not local.numel():
            return values
        inner, (first, *starts) = parameter.shape[1:], begins
        columns = tuple(slice(start, start + size) for start, size in zip(starts, local.shape[1:], strict=True))
        rows, past = max(BLOCK // max(inner.numel(), 1), 1), first + local.shape[0]
        for block in range(first // rows, -(-past // rows)):
            top, bottom = block * rows, min((block + 1) * rows, parameter.shape[0])
            generator = torch.Generator().manual_seed(derive(seed, block))
            numbers = torch.randn((bottom - top, *inner), generator=generator).mul_(std)
            begin, end = max(top, first), min(bottom, past)
            local[begin - first : end - first].copy_(numbers[(slice(begin - top, end - top), *columns)])
        return values

    def placed(self, whole_values: Tensor, parameter: Tensor) -> Tensor:
        """Values that were computed for the whole parameter."""
        values = torch.empty_like(parameter)
        local, begins = self.region(values)
        here = tuple(slice(start, start + size) for start, size in zip(begins, local.shape, strict=True))
        local.copy_(whole_values[here])
        return values


@torch.no_grad()
def initialise(model: nn.Module, how: Initialisation, *, layers: int, seed: int, region: Region = whole) -> None:
    """Fill every parameter of `model` in place, drawn from (seed, parameter name), one at a time.

    The values don't depend on device, sharding, or on which other parameters there are. Projections and
    embeddings follow `how` (times a projection's own `init_gain`), biases are 0, norms are the identity; a module with a
    `draw_parameters(draw)` of its own is asked. A parameter that two modules share is drawn for the first.

    Args:
        layers: of the model, for `scale_residual`.
        region: which part of a parameter lies in this process, where it is sharded.
    """
    drawn: set[int] = set()
    for prefix, module in model.named_modules():
        fresh = {id(parameter) for parameter in module.parameters(recurse=False)} - drawn
        if not fresh:
            continue
        drawn |= fresh
        draw = InitialValues(seed, prefix, region)
        if isinstance(module, DrawsParameters):
            module.draw_parameters(draw)
        elif isinstance(module, Projection):
            std = how.linear_std(module) * module.init_gain
            if how.scale_residual and module.writes_residual:
                std /= math.sqrt(2 * layers)
            if id(module.weight) in fresh:
                module.weight.copy_(draw.normal("weight", module.weight, std))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(draw.normal("weight", module.weight, how.embedding_std(module.embedding_dim)))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(1.0 if name == "weight" else 0.0)

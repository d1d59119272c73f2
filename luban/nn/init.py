"""Initialisation: every parameter a pure function of the seed and its own name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.core.seeding import derive
from luban.nn.linear import Projection

BLOCK = 1 << 16  # numbers drawn from one seed, so that a part of a parameter needs only the blocks it lies in


class Region(NamedTuple):
    """The parts of a parameter that lie in this process."""

    shape: tuple[int, ...]  # of the whole parameter
    pieces: list[tuple[Tensor, tuple[int, ...]]]  # views of what is here, each with the index at which it begins


FindRegion = Callable[[str, Tensor], Region]  # a parameter's qualified name, and the parameter or a tensor like it


@runtime_checkable
class DrawsParameters(Protocol):
    """A module with an initialisation of its own."""

    def draw_parameters(self, draw: InitialValues) -> None:
        """Set the parameters and buffers that it owns itself, in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class Initialisation(Variant):
    """Base config of the initialisation of linear layers and embeddings (registry `initialisation`)."""

    registry: ClassVar[Registry] = Registry(
        "initialisation",
        {
            "normal": "luban.nn.init:NormalInit",
            "fan_in": "luban.nn.init:FanInInit",
            "xavier": "luban.nn.init:XavierInit",
        },
    )
    scale_residual: bool = True  # divide weights that write to the residual stream by √(2·layers) (GPT-2)

    def linear_std(self, layer: Projection) -> float:
        """Standard deviation of a projection's weights."""
        raise NotImplementedError

    def embedding_std(self, width: int) -> float:
        """Standard deviation of an embedding weight (rows, width)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NormalInit(Initialisation):
    """One standard deviation for all (GPT-2: 0.02)."""

    std: float = 0.02  # of linear layers and embeddings

    def __post_init__(self):
        if not self.std > 0:
            raise ConfigError(f"initialisation std must be positive, {self.std} given")

    def linear_std(self, layer: Projection) -> float:
        """`std`."""
        return self.std

    def embedding_std(self, width: int) -> float:
        """`std`."""
        return self.std


@dataclass(frozen=True, kw_only=True)
class FanInInit(Initialisation):
    """1/√inputs for linear layers, so that widths keep the variance; a fixed one for embeddings."""

    embedding: float = 0.02  # standard deviation of embedding weights

    def linear_std(self, layer: Projection) -> float:
        """1/√inputs."""
        return layer.in_features**-0.5

    def embedding_std(self, width: int) -> float:
        """`embedding`."""
        return self.embedding


@dataclass(frozen=True, kw_only=True)
class XavierInit(Initialisation):
    """√(2 / (inputs + outputs)) for linear layers (Glorot & Bengio 2010, equation 12); a fixed one for embeddings."""

    embedding: float = 0.02  # standard deviation of embedding weights

    def linear_std(self, layer: Projection) -> float:
        """√(2 / (inputs + outputs))."""
        return math.sqrt(2 / (layer.in_features + layer.out_features))

    def embedding_std(self, width: int) -> float:
        """`embedding`."""
        return self.embedding


def whole(name: str, tensor: Tensor) -> Region:
    """The region of a parameter that isn't divided."""
    return Region(tensor.shape, [(tensor, (0,) * tensor.dim())])


def cut(whole_values: Tensor, local: Tensor, begins: Sequence[int]) -> Tensor:
    """What of the whole lies in `local`, which begins at the index `begins` (a view)."""
    return whole_values[tuple(slice(begin, begin + size) for begin, size in zip(begins, local.shape, strict=True))]


@dataclass(frozen=True)
class InitialValues:
    """Values for the parameters of one module, each with the dtype, device and sharding of its parameter."""

    seed: int  # of the run
    prefix: str  # the module's name
    region: FindRegion = whole  # the parts of a parameter that lie in this process

    def normal(self, name: str, parameter: Tensor, std: float) -> Tensor:
        """Normal numbers of mean 0 for the parameter `name` of the module, of at least one dimension.

        Each number depends only on seed, name and its index in the parameter, so that a sharded parameter gets the same
        values as an unsharded one. They are drawn in float32 on the CPU, in blocks of rows of about BLOCK numbers, and
        rounded once.
        """
        values, seed = torch.empty_like(parameter), derive(self.seed, f"{self.prefix}.{name}")
        shape, pieces = self.region(self._qualified(name), values)
        for local, begins in pieces:
            if local.numel():
                _draw(local, begins, shape, seed, std)
        return values

    def placed(self, name: str, whole_values: Tensor, parameter: Tensor) -> Tensor:
        """This process's part of values that were computed for the whole parameter `name` of the module."""
        values = torch.empty_like(parameter)
        for local, begins in self.region(self._qualified(name), values).pieces:
            local.copy_(cut(whole_values, local, begins))
        return values

    def _qualified(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


def _draw(local: Tensor, begins: Sequence[int], shape: Sequence[int], seed: int, std: float) -> None:
    """Fill a piece, which begins at the index `begins` of a parameter of this shape."""
    inner, (first, *starts) = shape[1:], begins
    columns = tuple(slice(start, start + size) for start, size in zip(starts, local.shape[1:], strict=True))
    rows, past = max(BLOCK // max(math.prod(inner), 1), 1), first + local.shape[0]
    for block in range(first // rows, -(-past // rows)):
        top, bottom = block * rows, min((block + 1) * rows, shape[0])
        generator = torch.Generator().manual_seed(derive(seed, block))
        numbers = torch.randn((bottom - top, *inner), generator=generator).mul_(std)
        begin, end = max(top, first), min(bottom, past)
        local[begin - first : end - first].copy_(numbers[(slice(begin - top, end - top), *columns)])


@torch.no_grad()
def initialise(
    model: nn.Module,
    how: Initialisation,
    *,
    layers: int,
    seed: int,
    region: FindRegion = whole,
    without: Collection[str] = frozenset(),
) -> None:
    """Fill every parameter of `model` in place, drawn from (seed, parameter name), one at a time.

    The values don't depend on device, sharding, or on which other parameters there are. Projections and
    embeddings follow `how` (times a projection's own `init_gain`), biases are 0, norms are the identity; a module with
    `draw_parameters(draw)` initialises its own. A parameter that two modules share is drawn for the first.

    Args:
        layers: number of layers of the model, for `scale_residual`.
        region: the parts of a parameter that lie in this process, for divided models.
        without: names of parameters and buffers that aren't changed.

    Raises:
        TypeError: a module has buffers but no `draw_parameters` that sets them.
    """
    drawn = {id(parameter) for name, parameter in model.named_parameters() if name in without}
    for prefix, module in model.named_modules():
        buffers = [name for name, _ in module.named_buffers(prefix, recurse=False) if name not in without]
        fresh = {id(parameter) for parameter in module.parameters(recurse=False)} - drawn
        fresh |= {id(buffer) for buffer in module.buffers(recurse=False)} if buffers else set()
        if buffers and not isinstance(module, DrawsParameters):
            raise TypeError(f"{buffers[0]} is a buffer, so {type(module).__name__} must set it in draw_parameters")
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

"""What a process holds of a run's state, for checkpoints, and taking it up again under any plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from luban.nn.init import Region
from luban.optim.base import Optimizer
from luban.parallel.placement import Placements
from luban.parallel.precision import MixedPrecisionParams

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import

    Params = MixedPrecisionParams | ShardedParams


class Described(Protocol):
    """What is known of a stored tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Stored(Protocol):
    """State on disk."""

    def entries(self, collection: str) -> Mapping[str, Described]:
        """The tensors of a collection, "model" or "optimizer"."""
        ...

    def read(self, collection: str, name: str, begin: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A rectangle of a tensor."""
        ...


def held(params: Params, optimizer: Optimizer, placements: Placements) -> dict[str, dict[str, Region]]:
    """The parts of weights ("model") and optimizer state ("optimizer") that this process has, as views, but for weights that the
    optimizer averages."""
    weights = {**params.state_dict(), **optimizer.averages()}
    model = {name: placements.region(name, tensor) for name, tensor in weights.items()}
    states = {}
    for entry, value in optimizer.state_dict().items():
        name = parameter_of(entry)
        if value.dim() and value.shape == params.parameters[name].shape:
            states[entry] = placements.region(name, params.like(name), value)
        else:
            states[entry] = Region(tuple(value.shape), [(value, (0,) * value.dim())])
    return {"model": model, "optimizer": states}


@torch.no_grad()
def take_up(stored: Stored, params: Params, optimizer: Optimizer, placements: Placements) -> None:
    """Read the parts that this process needs, one tensor at a time."""
    for name, tensor in params.state_dict().items():
        _fill(stored, "model", name, placements.region(name, tensor))
    params.refresh()
    known, states = stored.entries("model"), {}
    for entry, described in stored.entries("optimizer").items():
        name = parameter_of(entry)
        if name not in params.parameters and name in known:
            continue  # another process has it
        dtype = getattr(torch, described.dtype)
        whole = None
        if name in params.parameters and described.shape:
            values = torch.empty(params.parameters[name].shape, dtype=dtype)
            region = placements.region(name, params.like(name), values)
            whole = tuple(region.shape)
        if whole == tuple(described.shape):
            _fill(stored, "optimizer", entry, region)
            states[entry] = values
        else:
            states[entry] = stored.read("optimizer", entry, (0,) * len(described.shape), described.shape)
    optimizer.load_state_dict(states)
    params.refresh()  # the state of some optimizers has weights in it


def _fill(stored: Stored, collection: str, name: str, region: Region) -> None:
    for local, begin in region.pieces:
        if local.numel():
            local.copy_(stored.read(collection, name, begin, tuple(local.shape)))


def parameter_of(entry: str) -> str:
    """The parameter of an entry of the optimizer's state: `NAME/key`."""
    return entry.rpartition("/")[0]

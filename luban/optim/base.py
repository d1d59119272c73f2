"""What an optimizer is to the trainer: named parameters with roles, one learning-rate factor, state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from luban.core.errors import ArtifactError
from luban.core.registry import Registry, Variant
from luban.nn.roles import HIDDEN, VECTORS, Role

Shapes = Mapping[str, Sequence[int]]  # of parameters, by name
Roles = Mapping[str, Role]


class DividedMatrices(Protocol):
    """Matrices of which each process updates a part."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix."""
        ...

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor like the matrix; all processes that hold it call this in the same order."""
        ...

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Variant):
    """An optimizer's settings. `build` makes the optimizer."""

    registry: ClassVar[Registry] = Registry(
        "optimizer",
        {
            "adamw": "luban.optim.adamw:AdamW",
            "muon": "luban.optim.muon:Muon",
            "adafactor": "luban.optim.adafactor:Adafactor",
            "lamb": "luban.optim.lamb:Lamb",
            "lion": "luban.optim.lion:Lion",
            "soap": "luban.optim.soap:Soap",
            "schedule_free": "luban.optim.schedule_free:ScheduleFree",
        },
    )

    rounds_stochastically: ClassVar[bool] = False  # bf16 weights, which would lose small updates otherwise

    elementwise: ClassVar[bool] = False  # every number is updated by itself, so that shards of a matrix can be

    keeps_rate: ClassVar[bool] = False  # made for a learning rate that doesn't decay

    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # decoupled decay (times the learning rate), on matrices only

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, {self.lr} given")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, {self.weight_decay} given")

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Roles,
        divided: DividedMatrices | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Optimizer:
        """The optimizer of these named parameters.

        Args:
            rates: factors on the learning rate of some parameters, by name.
            divided: where the parameters are parts of matrices that several processes hold, for optimizers that need whole
                ones; None: they are whole.
        """
        raise NotImplementedError

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """Bytes of state that it keeps for parameters of these shapes, for the memory prediction."""
        raise NotImplementedError

    def workspace_bytes(self, shapes: Shapes, roles: Roles, *, widened: bool) -> int:
        """Bytes that an update takes beside state, weights and gradients, at its peak.

        Args:
            widened: gradients in half precision are turned into fp32 for it, as on a CPU.
        """
        return 0

    def update_flops(self, shapes: Shapes, roles: Roles) -> int:
        """FLOPs of matmuls in one update."""
        return 0


def hidden_matrices(roles: Roles) -> set[str]:
    """Names of the matrices inside Transformer layers."""
    return {name for name, role in roles.items() if role in HIDDEN}


def vectors(roles: Roles) -> set[str]:
    """Names of norms' scales, biases and parameters of position methods: never decayed."""
    return {name for name, role in roles.items() if role in VECTORS}


@dataclass(frozen=True)
class Update:
    """What one step hands to every optimizer. Scalars stay on the device, so that the host doesn't wait for them."""

    gradients: Mapping[nn.Parameter, Tensor]  # in any floating dtype
    scale: Tensor  # (): factor on every gradient: clipping, loss scale
    apply: Tensor  # () bool: false after a bad step, when nothing may change
    copies: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)  # half-precision weights to refresh

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> Update:
        """From the parameters' own `.grad`, as they are."""
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        device = next(iter(gradients)).device
        return cls(gradients, torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device))


class ParamGroups:
    """One algorithm over groups of parameters. Each group carries `peak_lr`; its state is named tensors."""

    on_host: ClassVar[frozenset[str]] = (
        frozenset()
    )  # keys of state that stays on the CPU, so that reading it doesn't wait

    def __init__(self, groups: Sequence[dict[str, Any]]):
        self.groups = [group for group in groups if group["params"]]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for group in self.groups for p in group["params"]}

    def step(self, factor: float, update: Update) -> None:
        """Update every parameter that has a gradient, at `factor` times its peak learning rate."""
        raise NotImplementedError

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """The weights that a model is evaluated and saved with, where they aren't those that gradients are taken at."""
        return {}


TRAINED = "trained"  # key of weights that gradients are taken at, in the state of optimizers that average others


class Optimizer:
    """One or more algorithms driven together.

    State leaves and enters as named tensors (`decoder.blocks.0.mixer.qkv.q.weight/exp_avg`), so that no pickle and no
    group order is involved.
    """

    def __init__(self, algorithms: Sequence[ParamGroups], parameters: Mapping[str, nn.Parameter]):
        self.algorithms = list(algorithms)
        self.parameters = dict(parameters)

    def step(self, factor: float, update: Update | None = None) -> None:
        """Update every parameter at `factor` times its peak learning rate; by default from its `.grad`."""
        update = Update.of(self.parameters.values()) if update is None else update
        with torch.no_grad():
            for algorithm in self.algorithms:
                algorithm.step(factor, update)

    def finish(self) -> bool:
        """Wait for an update that is still running; whether there was one: there is none."""
        return False

    def averages(self) -> dict[str, Tensor]:
        """The weights that the model is evaluated and saved with, by name, where they aren't the parameters."""
        found = {parameter: x for algorithm in self.algorithms for parameter, x in algorithm.averages().items()}
        return {name: found[parameter] for name, parameter in self.parameters.items() if parameter in found}

    @contextmanager
    def averaged(self, copies: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Within it the parameters are `averages`; afterwards they are what they were.

        Args:
            copies: half-precision weights behind them, which follow.
        """
        averages = self.averages()
        kept = {name: self.parameters[name].detach().clone() for name in averages}
        self._set(averages, copies)
        try:
            yield
        finally:
            self._set(kept, copies)

    @torch.no_grad()
    def _set(self, weights: Mapping[str, Tensor], copies: Mapping[nn.Parameter, Tensor]) -> None:
        for name, tensor in weights.items():
            parameter = self.parameters[name]
            parameter.copy_(tensor)
            if parameter in copies:
                copies[parameter].copy_(parameter)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as `parameter/key` → tensor; with it the parameters themselves where `averages` are saved in their place."""
        found = {f"{name}/{TRAINED}": self.parameters[name].detach() for name in self.averages()}
        for name, parameter in self.parameters.items():
            for algorithm in self.algorithms:
                for key, value in algorithm.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = value
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that `state_dict` gave, and parameters that are in it. Raises ArtifactError for a parameter the model does not have."""
        for entry, value in tensors.items():
            name, _, key = entry.rpartition("/")
            if name not in self.parameters:
                raise ArtifactError(f"the optimizer state holds '{name}', which the model does not have")
            parameter = self.parameters[name]
            if key == TRAINED:
                with torch.no_grad():
                    parameter.copy_(value)
                continue
            algorithm = next(algorithm for algorithm in self.algorithms if parameter in algorithm.state)
            known = algorithm.state[parameter].get(key)
            if known is not None and known.shape == value.shape and known.dtype == value.dtype:
                known.copy_(value)  # it stays where it is, which may be a file
            else:
                device = torch.device("cpu") if key in algorithm.on_host else parameter.device
                algorithm.state[parameter][key] = value.to(device, copy=True)

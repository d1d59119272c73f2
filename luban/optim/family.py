"""What an optimizer is to the trainer: named fp32 parameters, one learning-rate factor, state as named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ArtifactError
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Optimizer(Variant):
    """An optimizer's settings. `build` makes the thing that steps."""

    registry: ClassVar[Registry] = Registry(
        "optimizer",
        {
            "adamw": "luban.optim.adamw:AdamW",
            "muon": "luban.optim.muon:Muon",
        },
    )

    rounds_stochastically: ClassVar[bool] = False  # bf16 weights, which would lose small updates otherwise

    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.1  # decoupled decay (times the learning rate), on matrices only

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, {self.lr} given")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, {self.weight_decay} given")

    def build(self, parameters: Mapping[str, nn.Parameter]) -> Stepper:
        """The stepping optimizer over these named parameters."""
        raise NotImplementedError

    def state_bytes(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Bytes of state that it keeps for parameters of these shapes, for the memory prediction."""
        raise NotImplementedError

    def workspace_bytes(self, shapes: Mapping[str, Sequence[int]], *, widened: bool) -> int:
        """Bytes that an update takes beside state, weights and gradients, at its peak.

        Args:
            widened: gradients in half precision are turned into fp32 for it, as on a CPU.
        """
        return 0

    def update_flops(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """FLOPs of matrix products in one update."""
        return 0


@dataclass(frozen=True)
class Roles:
    """Parameters by what they are: each optimizer treats these three differently."""

    hidden: dict[str, nn.Parameter]  # matrices inside the blocks
    tables: dict[str, nn.Parameter]  # embeddings and the head
    vectors: dict[str, nn.Parameter]  # norms' gains, biases: never decayed


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether the parameter is a matrix inside a block (`blocks.…`), neither embedding nor head."""
    return len(shape) == 2 and "blocks." in name


def by_role(parameters: Mapping[str, nn.Parameter]) -> Roles:
    """Sort named parameters into roles."""
    hidden = {n: p for n, p in parameters.items() if is_hidden_matrix(n, p.shape)}
    tables = {n: p for n, p in parameters.items() if p.ndim >= 2 and n not in hidden}
    return Roles(hidden, tables, {n: p for n, p in parameters.items() if p.ndim < 2})


@dataclass(frozen=True)
class Update:
    """What one step hands to every optimizer. Scalars stay on the device, so that no host waits for them."""

    gradients: Mapping[nn.Parameter, Tensor]  # in whatever floating type
    scale: Tensor  # (): factor on every gradient: clipping, loss scale
    go: Tensor  # () bool: false after a bad step, when nothing may change
    copies: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)  # half-precision weights to refresh

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> Update:
        """From the parameters' own `.grad`, as they are."""
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        device = next(iter(gradients)).device
        return cls(gradients, torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device))


class Part:
    """One algorithm over some of the parameters. Each group carries `peak_lr`; its state is named tensors."""

    def __init__(self, groups: Sequence[dict[str, Any]]):
        self.groups = [group for group in groups if group["params"]]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {p: {} for group in self.groups for p in group["params"]}

    def step(self, factor: float, update: Update) -> None:
        """Update every parameter that has a gradient, at `factor` times its peak learning rate."""
        raise NotImplementedError


class Stepper:
    """One or more parts driven together.

    State leaves and enters as named tensors (`blocks.0.attention.q.weight/exp_avg`), so that no pickle and no
    group order is involved.
    """

    def __init__(self, parts: Sequence[Part], parameters: Mapping[str, nn.Parameter]):
        self.parts = list(parts)
        self.parameters = dict(parameters)

    def step(self, factor: float, update: Update | None = None) -> None:
        """Update every parameter at `factor` times its peak learning rate; by default from its `.grad`."""
        update = Update.of(self.parameters.values()) if update is None else update
        with torch.no_grad():
            for part in self.parts:
                part.step(factor, update)

    def state(self) -> dict[str, Tensor]:
        """The state as `parameter/key` → tensor."""
        found = {}
        for name, parameter in self.parameters.items():
            for part in self.parts:
                for key, value in part.state.get(parameter, {}).items():
                    found[f"{name}/{key}"] = value
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that `state` gave. Raises ArtifactError for a parameter the model does not have."""
        for entry, value in tensors.items():
            name, _, key = entry.rpartition("/")
            if name not in self.parameters:
                raise ArtifactError(f"the optimizer state holds '{name}', which the model does not have")
            parameter = self.parameters[name]
            part = next(part for part in self.parts if parameter in part.state)
            part.state[parameter][key] = value.to(parameter.device, copy=True)

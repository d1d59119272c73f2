"""Optimizers that update one tensor at a time from its gradient and its own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.optim.adamw import refresh
from luban.optim.base import DividedMatrices, Optimizer, OptimizerConfig, ParamGroups, Roles, Update, vectors

State = dict[str, Tensor]


class TensorwiseConfig(OptimizerConfig):
    """Base of their configs: two groups, matrices, which decay, and vectors (norms, biases), which don't."""

    algorithm: ClassVar[type[Tensorwise]]

    def settings(self) -> dict[str, Any]:
        """What `Tensorwise.advance` reads of a group beside `peak_lr` and `decay`."""
        raise NotImplementedError

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Roles,
        divided: DividedMatrices | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Optimizer:
        """The optimizer. Raises ConfigError where it needs whole matrices and has parts of them."""
        if divided is not None and not self.elementwise:
            name = self.registry.name_of(type(self))
            raise ConfigError(
                f"{name} needs whole matrices, which plan.shard and plan.tensor divide: use adamw or muon"
            )
        plain, factors = vectors(roles), rates or {}
        grouped: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            grouped.setdefault((factors.get(name, 1.0), name not in plain), []).append(parameter)
        groups = [
            {
                "params": members,
                "peak_lr": self.lr * factor,
                "decay": self.weight_decay if matrices else 0.0,
                "matrices": matrices,
                **self.settings(),
            }
            for (factor, matrices), members in grouped.items()
        ]
        return Optimizer([self.algorithm(groups)], parameters)


class Tensorwise(ParamGroups):
    """Steps tensor by tensor, in float32 or wider. After a bad step neither weights nor state change, but for what is `on_host`."""

    def step(self, factor: float, update: Update) -> None:
        """As every algorithm's."""
        for group in self.groups:
            stepped = [p for p in group["params"] if p in update.gradients]
            for parameter in stepped:
                self._step(parameter, group, group["peak_lr"] * factor, update)
            refresh(stepped, update)

    def _step(self, parameter: nn.Parameter, group: dict[str, Any], lr: float, update: Update) -> None:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        weight, gradient = parameter.detach().to(wide), update.gradients[parameter].to(wide) * update.scale.to(wide)
        gradient = torch.where(update.apply, gradient, 0.0)
        if not self.state[parameter]:
            self.state[parameter].update(self.begin(weight, group))
        state = self.state[parameter]
        new_weight, new_state = self.advance(weight, gradient, dict(state), lr, group)
        parameter.copy_(torch.where(update.apply, new_weight, weight))
        for name, value in new_state.items():
            state[name] = value if name in self.on_host else torch.where(update.apply, value, state[name])

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """The state before the first step."""
        raise NotImplementedError

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """(new weight, new state); neither argument is changed."""
        raise NotImplementedError

"""Mixed precision: matmuls in half precision, weights and moments in fp32 (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.models.build import state_of
from luban.nn.moe.layer import RouterLinear
from luban.optim.base import Optimizer
from luban.parallel.kept_sums import KeptSums

COMPUTE = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


class MixedPrecisionParams:
    """The parameters that the optimizer updates, behind a model that computes in `dtype`.

    The model's own parameters are in the compute dtype, but for the routers of experts, which stay in fp32. With `masters` an fp32 copy stands behind each, which the
    optimizer updates and copies back; without them it updates the model's own, with stochastic rounding in bf16.

    Parameters that require no gradient are kept in the compute dtype alone.

    Args:
        model: with initialised float32 (or float64) parameters; they become the masters, and the model gets new ones.
        fixed: names of parameters and buffers that a run's checkpoints leave out: a frozen base's.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, *, masters: bool = True, fixed: Collection[str] = frozenset()
    ):
        self.model, self.fixed = model, fixed
        self.masters = masters and dtype in (torch.bfloat16, torch.float16)
        held = dict(model.named_parameters())
        if next(iter(held.values())).dtype != dtype:
            _replace_parameters(model, dtype)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = {name: held[name] for name in self.working} if self.masters else self.working
        self._kept = KeptSums(borrows=True)

    def keep_moments(self, optimizer: Optimizer) -> None:
        """Where the optimizer's state is to be: where the optimizer makes it."""

    def begins(self) -> dict[str, int]:
        """Where shards begin: nothing is sharded."""
        return {}

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch: nothing to do."""

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch off the model and add them up in fp32."""
        named = {n: p.grad for n, p in self.working.items() if p.grad is not None}
        self._kept.add(named)
        self._drop_gradients()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the step has reached, in the model's order: the sums, or those of its only backward as they are."""
        sums = self._kept.sums or {n: p.grad for n, p in self.working.items() if p.grad is not None}
        return {name: sums[name] for name in self.working if name in sums}

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The model's tensor behind every master."""
        pairs = ((self.parameters[name], working) for name, working in self.working.items())
        return {master: working.detach() for master, working in pairs if working is not master}

    def gather(self) -> None:
        """After the weights have changed: this process has all of them."""

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._kept.clear()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.working.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters (the masters, where there are such) and persistent buffers by name, but for what is `fixed`; shared ones
        are named once."""
        state = {**state_of(self.model), **{name: p.detach() for name, p in self.parameters.items()}}
        return {name: tensor for name, tensor in state.items() if name not in self.fixed}

    def like(self, name: str) -> Tensor:
        """The parameter, of which this process holds all that it updates."""
        return self.parameters[name].detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters to the model, after they were set."""
        if self.masters:
            for name, parameter in self.working.items():
                parameter.copy_(self.parameters[name])

    def whole(self, name: str, local: Tensor) -> Tensor:
        """A tensor of the model's or the optimizer's state as it is: FSDP divides nothing here."""
        return local

    def part(self, name: str, whole: Tensor) -> Tensor:
        """A tensor of the optimizer's state as it is."""
        return whole

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights up, into masters and model."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name])
        self.refresh()


def _replace_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Register a copy in `dtype` for every parameter but those of routers; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if dtype.itemsize < torch.float32.itemsize and isinstance(module, RouterLinear):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halved on overflow, doubled after `interval` good steps in a row."""

    value: float = 1.0  # the factor on the loss
    growth: float = 1.0  # what a run of good steps multiplies it by (1: fixed)
    interval: int = 200  # good steps before it grows
    good: int = 0  # good steps since the last change
    least: float = 1.0  # below this an overflow is no longer the scale's fault

    @classmethod
    def of(cls, precision: str) -> LossScale:
        """Dynamic for fp16 from 2¹⁶, otherwise always 1."""
        return cls(value=2.0**16, growth=2.0) if precision == "fp16" else cls()

    def update(self, overflow: bool) -> bool:
        """Count one step. Returns whether an overflow is explained by the scale being too large."""
        if overflow:
            self.good = 0
            blame = self.growth > 1 and self.value > self.least
            if blame:
                self.value /= self.growth
            return blame
        self.good += 1
        if self.growth > 1 and self.good >= self.interval:
            self.value, self.good = self.value * self.growth, 0
        return False

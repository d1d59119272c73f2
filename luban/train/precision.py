"""Mixed precision: products in half precision, weights and moments in fp32 (Micikevicius et al. 2018).

The module's own parameters are in the compute type. Behind them stand fp32 masters, which the optimizer steps and
from which it refreshes them; or nothing does, and it steps them themselves with stochastic rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


class Masters:
    """The parameters that the optimizer steps, behind a module that computes in `dtype`.

    Args:
        module: its parameters are turned into `dtype` in place.
        split: keep fp32 masters of a half-precision module.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, split: bool = True):
        self.working = dict(module.named_parameters())
        self.split = split and dtype is not torch.float32
        self.parameters = self.working
        if self.split:
            self.parameters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.working.items()}
        for parameter in self.working.values():
            parameter.data = parameter.data.to(dtype)
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients of a micro-batch off the module and add them up in fp32."""
        named = {n: p.grad for n, p in self.working.items() if p.grad is not None}
        if not self._sums:
            self._sums = {n: gradient.float() for n, gradient in named.items()}
        else:
            torch._foreach_add_([self._sums[n] for n in named], list(named.values()))
        for parameter in self.working.values():
            parameter.grad = None

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Of every parameter that the step has reached: the fp32 sums, or those of its only backward as they are."""
        sums = self._sums or {n: p.grad for n, p in self.working.items() if p.grad is not None}
        return {self.parameters[name]: gradient for name, gradient in sums.items()}

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The module's tensor of every master."""
        return {self.parameters[n]: p.data for n, p in self.working.items()} if self.split else {}

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums = {}
        for parameter in self.working.values():
            parameter.grad = None

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights up, into masters and module."""
        for name, master in self.parameters.items():
            master.data.copy_(tensors[name])
            if self.split:
                self.working[name].data.copy_(master.data)


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

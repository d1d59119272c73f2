"""Mixed precision: products in half precision, weights and moments in fp32 (Micikevicius et al. 2018).

The module's own parameters are in the compute type; the optimizer steps fp32 masters, from which they are
copied back. Gradients of micro-batches are summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Masters:
    """The fp32 parameters behind a module that computes in `dtype`; with fp32, the module's own."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.working = dict(module.named_parameters())
        self.split = dtype is not torch.float32
        self.parameters = self.working
        if self.split:
            self.parameters = {n: nn.Parameter(p.detach().clone()) for n, p in self.working.items()}
            for master in self.parameters.values():
                master.grad = torch.zeros_like(master)
            for parameter in self.working.values():
                parameter.data = parameter.data.to(dtype)
        self._empty = True

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients of the last backward to the masters'."""
        if not self.split:
            return
        named = [(self.parameters[n].grad, p) for n, p in self.working.items() if p.grad is not None]
        sums, gradients = [g for g, _ in named], [p.grad for _, p in named]
        (torch._foreach_copy_ if self._empty else torch._foreach_add_)(sums, gradients)
        self._empty = False
        for _, parameter in named:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The fp32 gradients of the step so far."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the module."""
        if self.split:
            torch._foreach_copy_([p.data for p in self.working.values()], [p.data for p in self.parameters.values()])

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._empty = True
        if not self.split:
            for parameter in self.parameters.values():
                parameter.grad = None

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take weights up, into masters and module."""
        for name, master in self.parameters.items():
            master.data.copy_(tensors[name])
        self.publish()


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

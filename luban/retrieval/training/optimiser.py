"""Steps over questions: which a step reads, and AdamW with a rate that rises and falls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from luban.core.seeding import generator
from luban.parallel.world import World

T = TypeVar("T")


class Optimiser:
    """One update a step.

    Args:
        lr: highest learning rate, after a linear rise over a tenth of the steps; then it falls linearly to 0.
        total: steps.
        clip: largest norm of the gradient.
        world: processes whose gradients are summed.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, total: int, clip: float, world: World | None = None):
        self.parameters, self.clip, self.world = list(parameters), clip, world or World()
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        rise = max(total // 10, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / rise, (total - step) / max(total - rise, 1))
        )

    def step(self) -> None:
        """Update the parameters by their gradients, and drop these."""
        if self.world.size > 1:
            self._sum_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()

    def _sum_gradients(self) -> None:
        zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)
        summed = self.world.sum(torch.cat([gradient.reshape(-1) for gradient in zeros]))
        parts = summed.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view(parameter.shape)


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters of a module, made to take gradients."""
    return [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]


def step_count(items: int, batch_size: int, epochs: int) -> int:
    """Steps of so many passes over the items; what doesn't fill a batch is left out of a pass."""
    return max(items // batch_size, 1) * epochs


def batches(items: Sequence[T], batch_size: int, epochs: int, seed: int) -> Iterator[list[T]]:
    """The items of each step, every pass in another order."""
    for epoch in range(epochs):
        order = generator(seed, "order", epoch).permutation(len(items))
        for step in range(step_count(len(items), batch_size, 1)):
            yield [items[place] for place in order[step * batch_size : (step + 1) * batch_size]]

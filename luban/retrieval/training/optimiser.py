"""AdamW with a rate that rises and falls, for models trained on questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Optimiser:
    """One update a step.

    Args:
        lr: highest learning rate, after a linear rise over a tenth of the steps; then it falls linearly to 0.
        total: steps.
        clip: largest norm of the gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, total: int, clip: float):
        self.parameters, self.clip = list(parameters), clip
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        rise = max(total // 10, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / rise, (total - step) / max(total - rise, 1))
        )

    def step(self) -> None:
        """Update the parameters by their gradients, and drop these."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters of a module, made to take gradients."""
    return [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]

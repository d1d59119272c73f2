"""One-step delayed updates (Ren et al. 2021, section 5.2): the host updates while the device computes the next step.

The forward pass of step t + 1 reads weights that don't have the update of step t yet. The first steps aren't delayed, since weights change
fast in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor, nn

from luban.optim.base import Optimizer, Update

WARM_UP = 40  # steps that aren't delayed, as in the paper


class DelayedOptimizer(Optimizer):
    """An optimizer whose updates become visible one step late.

    Args:
        optimizer: over parameters on the host.
        warm_up: steps before that.
    """

    def __init__(self, optimizer: Optimizer, warm_up: int = WARM_UP):
        super().__init__(optimizer.algorithms, optimizer.parameters)
        self.warm_up, self.steps = warm_up, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="luban-update")
        self._running: tuple[Future[None], Mapping[nn.Parameter, Tensor]] | None = None

    def step(self, factor: float, update: Update | None = None) -> None:
        """Let the last update become visible, and begin this one."""
        self.finish()
        self.steps += 1
        if update is None or self.steps <= self.warm_up:
            super().step(factor, update)
            return
        working = replace(update, copies={})
        self._running = self._thread.submit(super().step, factor, working), update.copies

    @torch.no_grad()
    def finish(self) -> bool:
        """Wait for the update that is still running, and refresh the half-precision weights behind it; whether there was one."""
        if self._running is None:
            return False
        future, copies = self._running
        self._running = None
        future.result()
        for master, working in copies.items():
            working.copy_(master)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """As the optimizer's, after the last update."""
        self.finish()
        return super().state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """As the optimizer's; the count of steps goes on."""
        self.finish()
        super().load_state_dict(tensors)
        self.steps = max((int(value) for name, value in tensors.items() if name.endswith("/step")), default=0)

"""Data parallelism: every process has the whole model, and gradients are summed while the backward pass goes on (Li et al. 2020,
section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luban.parallel.exchange import Found, GradientExchange, grouped, wide
from luban.parallel.precision import MixedPrecisionParams
from luban.parallel.world import World


class ReplicatedParams(MixedPrecisionParams):
    """`MixedPrecisionParams` whose gradients arrive summed over the copies of the model.

    Args:
        blocks: the gradients of each are one message, once a step; those of every other parameter are one each.
        apart: names of parameters whose gradients others sum.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        world: World,
        dtype: torch.dtype,
        *,
        masters: bool = True,
        fixed: Collection[str] = frozenset(),
        apart: Collection[str] = frozenset(),
    ):
        super().__init__(model, dtype, masters=masters, fixed=fixed)
        self.use_world(world)
        groups = grouped(model, blocks, [name for name in self.working if name not in apart])
        self._exchange = GradientExchange(self.working, groups, self._summed)

    def use_world(self, world: World) -> None:
        """Sum over the copies in these processes from now on."""
        self._copies_of = world.sharing_groups("replicate")

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch: sums over processes are those of the whole step."""
        self._exchange.begin(active=last)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch off the model."""
        self._exchange.finish()
        super().accumulate()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the step has reached."""
        self.accumulate()
        sums = {**self._exchange.wait(), **self._kept.sums}
        return {name: sums[name] for name in self.working if name in sums}  # in all processes in the same order

    def clear(self) -> None:
        """Forget the step's gradients."""
        super().clear()
        self._exchange.clear()

    def _summed(self, found: Found) -> dict[str, Tensor]:
        flat = torch.cat([wide(gradient.reshape(-1)) for _, gradient in found])
        for group in self._copies_of:
            dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for _, gradient in found])
        return {name: part.view(gradient.shape) for (name, gradient), part in zip(found, parts, strict=True)}

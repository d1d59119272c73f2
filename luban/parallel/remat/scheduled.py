"""`plan.remat sqrt|rotor`: the layers of a stack run by a schedule, which is solved for costs measured in the first step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luban.models.stack import TransformerStack
from luban.nn.context import LayerContext
from luban.parallel.remat.executor import RandomState, ScheduledRun, Stage
from luban.parallel.routers import routers_of
from luban.planner.remat.chain import Chain, Schedule
from luban.planner.remat.schedules import schedule_of

MEASURED = 2  # runs of each layer: the first warms up


class ScheduledLayers:
    """Runs a stack's layers by the schedule of `remat` within `budget`.

    Costs are measured at the first forward pass of each shape of input: bytes as autograd saves them; seconds too where one
    process runs alone, otherwise a layer's number of parameters stands for them, since all processes must solve for the same
    schedule. While a layer is measured the memory of two layers is needed, not that of all.

    Args:
        timed: measure seconds.
        random: layers draw random numbers.
    """

    def __init__(self, remat: str, budget: str, *, timed: bool, random: bool):
        self.remat, self.budget, self.timed, self.random = remat, budget, timed, random
        self.schedules: dict[tuple[object, ...], Schedule] = {}

    def run(self, blocks: Sequence[tuple[nn.Module, LayerContext]], x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E) through the blocks."""
        stages = [partial(_call, block, ctx) for block, ctx in blocks]
        key = (x_BTE.shape, x_BTE.dtype, x_BTE.requires_grad, tuple(id(block) for block, _ in blocks))
        if key not in self.schedules:
            sizes = [sum(p.numel() for p in block.parameters()) for block, _ in blocks]
            outside = {_storage(p) for block, _ in blocks for p in block.parameters()}
            tallies = [layer.tally for block, _ in blocks for layer in routers_of(block).values()]
            totals = [tally.total for tally in tallies]
            chain = measured_chain(stages, x_BTE, outside, seconds=None if self.timed else sizes)
            for tally, total in zip(tallies, totals, strict=True):  # backward passes of measurements don't count
                tally.total = total
            self.schedules[key] = schedule_of(self.remat, chain, self.budget)
        return ScheduledRun(stages, self.schedules[key].operations, random=self.random).forward(x_BTE)


def _call(block: nn.Module, ctx: LayerContext, x_BTE: Tensor) -> Tensor:
    return block(x_BTE, ctx)


def schedule_stacks(stacks: Sequence[TransformerStack], remat: str, budget: str, *, timed: bool) -> None:
    """Let the layers of every stack run by a schedule."""
    for stack in stacks:
        random = any(isinstance(part, nn.Dropout) for part in stack.blocks.modules())
        stack.blocks.use_remat(ScheduledLayers(remat, budget, timed=timed, random=random))


def measured_chain(
    stages: Sequence[Stage], x: Tensor, outside: set[int] | None = None, *, seconds: Sequence[float] | None = None
) -> Chain:
    """Costs of stages, run one after the other from `x`; sizes in bytes.

    What two runs of a stage on the same input both save (weights, masks, rotations, the input) isn't the stage's own.

    Args:
        outside: storages that lie outside of the stages, such as weights.
        seconds: of each stage's forward pass, in any unit, a backward pass taking twice as long; None: they are measured.
    """
    generator = RandomState(x.device)
    forward, backward, outputs, saved = [], [], [], []
    current = x.detach()
    for number, stage in enumerate(stages):
        current.requires_grad_(x.requires_grad or number > 0)
        kept, times = [], (0.0, 0.0)
        for _ in range(MEASURED):
            tensors: list[Tensor] = []
            began = _now(x)
            with torch.enable_grad(), saved_tensors_hooks(partial(_keep, tensors), lambda tensor: tensor):
                y = stage(current)
            middle = _now(x)
            kept.append({_storage(t): t.untyped_storage().nbytes() for t in (*tensors, y.detach())})
            if seconds is None and y.requires_grad:
                inputs = [current] if current.requires_grad else _leaves(y)
                torch.autograd.grad(y, inputs, torch.zeros_like(y), retain_graph=True, allow_unused=True)
            times = (middle - began, _now(x) - middle)
            del tensors
            if len(kept) == 1:
                first = y  # alive, so that its graph's storages aren't taken for the second run's
        common = kept[0].keys() & kept[1].keys() | (outside or set())
        own = {key: size for key, size in kept[1].items() if key not in common}
        output = y.untyped_storage().nbytes()
        outputs.append(output)
        saved.append(max(sum(own.values()), output))
        forward.append(times[0] if seconds is None else seconds[number])
        backward.append(times[1] if seconds is None else 2 * seconds[number])
        current = y.detach()
        del first, y
    generator.restore()
    return Chain(
        forward=forward,
        backward=backward,
        output_size=outputs,
        saved_size=saved,
        input_size=x.untyped_storage().nbytes(),
    )


def _keep(tensors: list[Tensor], tensor: Tensor) -> Tensor:
    tensors.append(tensor.detach())
    return tensor.detach()


def _leaves(y: Tensor) -> list[Tensor]:
    """The parameters that a graph ends in."""
    found, pending, seen = [], [y.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending += [next_node for next_node, _ in node.next_functions]
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()

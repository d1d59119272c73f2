"""`plan.remat sqrt|rotor|pofo`: the layers of a stack run by a schedule, which is solved for costs measured in the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luban.core.log import say
from luban.models.stack import TransformerStack
from luban.nn.context import LayerContext
from luban.parallel.compile import stacks_of
from luban.parallel.remat.executor import RandomState, ScheduledRun, Stage
from luban.parallel.remat.host import Streams, Transfers, host_bandwidth
from luban.parallel.routers import routers_of
from luban.parallel.world import World
from luban.planner.remat.chain import Chain, Operation
from luban.planner.remat.pofo import Transfer, pofo
from luban.planner.remat.schedules import Solved, budget_bytes, schedule_of

MEASURED = 2  # runs of each layer: the first warms up


class ScheduledLayers:
    """Runs a stack's layers by the schedule of `remat` within `budget`.

    Costs are measured at the first forward pass of each shape of input: bytes as autograd saves them; seconds too where one
    process runs alone, otherwise a layer's number of parameters stands for them, since all processes must solve for the same
    schedule. While a layer is measured the memory of two layers is needed, not that of all.

    Args:
        timed: measure seconds.
        random: layers draw random numbers.
        announced: say what the first schedule keeps and computes again.
        divided: FSDP divides the layers' weights.
        agree: chain → one chain for all processes, where they measure at the same moment.
    """

    def __init__(
        self,
        remat: str,
        budget: str,
        *,
        timed: bool,
        random: bool,
        announced: bool = False,
        divided: bool = False,
        agree: Callable[[Chain, float], tuple[Chain, float]] = lambda *found: found,
    ):
        self.remat, self.budget, self.timed, self.random = remat, budget, timed, random
        self.divided, self.agree, self.announced = divided, agree, announced
        self.schedules: dict[tuple[object, ...], tuple[Sequence[Operation], Sequence[Transfer]]] = {}
        self.streams: Streams | None = None
        self.solved: Solved | None = None  # of the first shape: further ones have schedules like it

    def run(self, blocks: Sequence[tuple[nn.Module, LayerContext]], x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E) through the blocks."""
        stages = [partial(_call, block, ctx) for block, ctx in blocks]
        outside = {storage_key(p) for block, _ in blocks for p in block.parameters()}
        outside |= {storage_key(t) for _, ctx in blocks for t in tensors_in(ctx)}
        key = (x_BTE.shape, x_BTE.dtype, x_BTE.requires_grad, tuple(id(block) for block, _ in blocks))
        if key not in self.schedules:
            self.schedules[key] = self._solved(blocks, stages, x_BTE, outside)
        operations, moved = self.schedules[key]
        transfers = None
        if moved:
            self.streams = self.streams or Streams(x_BTE.device)
            transfers = Transfers(moved, self.streams, outside)
        return ScheduledRun(stages, operations, random=self.random, transfers=transfers).forward(x_BTE)

    def _solved(
        self, blocks: Sequence[tuple[nn.Module, LayerContext]], stages: Sequence[Stage], x: Tensor, outside: set[int]
    ) -> tuple[Sequence[Operation], Sequence[Transfer]]:
        """The schedule for measured costs."""
        sizes = [sum(p.numel() for p in block.parameters()) for block, _ in blocks]
        tallies = [layer.tally for block, _ in blocks for layer in routers_of(block).values()]
        totals = [tally.total for tally in tallies]
        chain = measured_chain(
            stages, x, outside, seconds=None if self.timed else sizes, backward_passes=not self.divided
        )
        for tally, total in zip(tallies, totals, strict=True):  # backward passes of measurements don't count
            tally.total = total
        transfers: Sequence[Transfer] = ()
        if self.remat == "pofo":
            chain, bandwidth = self.agree(chain, host_bandwidth(x.device))
            found = pofo(chain, budget_bytes(chain, self.budget), bandwidth)
            transfers = found.transfers
        else:
            found = schedule_of(self.remat, chain, self.budget)
        if self.solved is None:
            self.solved = Solved.of(
                self.remat, self.budget, chain, found.operations, found.peak, transfers=len(transfers)
            )
            if self.announced:
                say(f"plan.remat {self.remat}: {self.solved}")
        return found.operations, transfers


def _call(block: nn.Module, ctx: LayerContext, x_BTE: Tensor) -> Tensor:
    return block(x_BTE, ctx)


def schedule_stacks(
    stacks: Sequence[TransformerStack], remat: str, budget: str, *, timed: bool, world: World | None = None
) -> None:
    """Let the layers of every stack run by a schedule."""
    agree = partial(_agreed, world) if world is not None and world.size > 1 else lambda *found: found
    for stack in stacks:
        random = any(isinstance(part, nn.Dropout) for part in stack.blocks.modules())
        divided = world is not None and world.plan.shard > 1
        layers = ScheduledLayers(
            remat,
            budget,
            timed=timed or remat == "pofo",
            random=random,
            announced=world is not None and world.rank == 0,
            divided=divided,
            agree=agree,
        )
        stack.blocks.use_remat(layers)


def schedule_figures(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """`schedules`, what the one of each of this process's stacks keeps and computes again, for the manifest of a run; none
    without schedules."""
    ran = [stack.blocks.remat for stack in stacks_of(model)]
    found = [asdict(each.solved) for each in ran if isinstance(each, ScheduledLayers) and each.solved is not None]
    return {"schedules": found} if found else {}


def _agreed(world: World, chain: Chain, bandwidth: float) -> tuple[Chain, float]:
    """Of all processes the mean times, the largest sizes and the lowest bandwidth."""
    every = world.gather((chain, bandwidth))
    chains = [each for each, _ in every]

    def over(name: str, of: Callable[[list[float]], float]) -> list[float]:
        return [of(list(values)) for values in zip(*(getattr(each, name) for each in chains), strict=True)]

    agreed = Chain(
        forward=over("forward", fmean),
        backward=over("backward", fmean),
        output_size=over("output_size", max),
        saved_size=over("saved_size", max),
        input_size=max(each.x(0) for each in chains),
    )
    return agreed, min(rate for _, rate in every)


def tensors_in(ctx: object, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor among the attributes and items of an object, down to some depth."""
    if isinstance(ctx, Tensor):
        yield ctx
    elif depth and isinstance(ctx, list | tuple | set | frozenset):
        for item in ctx:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(ctx, Mapping):
        for item in ctx.values():
            yield from tensors_in(item, depth - 1)
    elif depth and hasattr(ctx, "__dict__") and not isinstance(ctx, nn.Module | type):
        for item in vars(ctx).values():
            yield from tensors_in(item, depth - 1)


def measured_chain(
    stages: Sequence[Stage],
    x: Tensor,
    outside: set[int] | None = None,
    *,
    seconds: Sequence[float] | None = None,
    backward_passes: bool = True,
) -> Chain:
    """Costs of stages, run one after the other from `x`; sizes in bytes.

    What two runs of a stage on the same input both save (weights, masks, rotations, the input) isn't the stage's own.

    Args:
        outside: storages that lie outside of the stages, such as weights.
        seconds: of each stage's forward pass, in any unit, a backward pass taking twice as long; None: they are measured.
        backward_passes: run backward passes, to time them; else they count as two forward passes. FSDP's hooks allow none apart
            from the step's.
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
            kept.append({storage_key(t): t.untyped_storage().nbytes() for t in (*tensors, y.detach())})
            if seconds is None and y.requires_grad and backward_passes:
                inputs = [current] if current.requires_grad else _leaves(y)
                torch.autograd.grad(y, inputs, torch.zeros_like(y), allow_unused=True)
            times = (middle - began, _now(x) - middle if backward_passes else 2 * (middle - began))
            if len(kept) == 1:
                first = (y, tensors)  # alive, so that their storages aren't taken for the second run's
        common = kept[0].keys() & kept[1].keys() | (outside or set())
        own = {key: size for key, size in kept[1].items() if key not in common}
        output = y.untyped_storage().nbytes()
        outputs.append(output)
        saved.append(max(sum(own.values()), output))
        forward.append(times[0] if seconds is None else seconds[number])
        backward.append(times[1] if seconds is None else 2 * seconds[number])
        current = y.detach()
        del first, tensors, y
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
            found.append(node.variable)  # type: ignore[attr-defined]
        pending += [next_node for next_node, _ in node.next_functions]
    return found


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()

"""ZeRO 1 and 2 (Rajbhandari et al. 2020): weights are whole in every process, in the dtype of the matmuls; fp32 weights, gradients and
optimizer state are divided.

Of a parameter with n rows process r of N has rows r·c to (r + 1)·c, c = ⌈n/N⌉. As soon as the backward pass has the gradients of a
layer, their rows go to the processes that have them, one message to each, in the dtype in which they were computed, and are summed
there in fp32. The optimizer writes its rows of the whole weights, which are gathered in place, layer by layer, while the next step
begins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from luban.nn.init import FindRegion, Region
from luban.parallel.collectives import all_gather_single
from luban.parallel.exchange import Found, GradientExchange, grouped, wide
from luban.parallel.placement import Placements
from luban.parallel.sharded_params import ShardedParams
from luban.parallel.world import World


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Begin and end of the rows that one of `size` processes has of `count`."""
    each = -(-count // size)
    return min(rank * each, count), min((rank + 1) * each, count)


def own_rows(model: nn.Module, world: World, placements: Placements, apart: Collection[str]) -> FindRegion:
    """The rows of every parameter that this process has: what it must draw of a model, as `WholeWeights` gathers the others'."""
    assert world.sharing is not None
    group = world.sharing.get_group("shard")
    divided = {name for name, p in model.named_parameters() if p.requires_grad and name not in apart}

    def find(name: str, tensor: Tensor) -> Region:
        if name not in divided:
            return placements.region(name, tensor)
        begin, end = rows_of(tensor.shape[0], dist.get_rank(group), group.size())
        return Region(tensor.shape, [(tensor[begin:end], (begin, *(0,) * (tensor.dim() - 1)))])

    return find


class WholeWeights(ShardedParams):
    """Parameters as the optimizer and checkpoints see them: this process's rows.

    Args:
        model: with initialised float32 (or float64) parameters, of which at least `own_rows`; it gets new ones, padded to N·c rows
            behind their end, with the rows of all processes.
        blocks: each a group; every other parameter is one by itself.
        zero: 2 sends the gradients of every micro-batch; 1 keeps them whole, in fp32, until the last of a step.
        dtype: of the matmuls.
        fixed: as of `ShardedParams`. apart: names of parameters that are left as they are.
        device: of the model's new parameters; None: that of those it has.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        world: World,
        *,
        zero: int,
        dtype: torch.dtype,
        fixed: Collection[str] = frozenset(),
        apart: Collection[str] = frozenset(),
        device: torch.device | None = None,
    ):
        assert world.sharing is not None
        self.model, self.fixed, self.zero = model, fixed, zero
        self.group, self.copies_of = world.sharing.get_group("shard"), world.sharing_groups("replicate")
        self.rank, self.size = dist.get_rank(self.group), self.group.size()
        held = dict(model.named_parameters())
        self._storages: dict[str, Tensor] = {}
        self._replace(held, dtype, apart, device)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters, self.divided, self._copies = {}, {}, {}
        for name, working in self.working.items():
            if name in apart:
                self.parameters[name] = self._master(held[name].detach(), working.detach())
                self.divided[name] = working if device is None else self.parameters[name]
                continue
            begin, end = rows_of(working.shape[0], self.rank, self.size)
            mine = self._storages[name][begin:end]
            self.parameters[name] = self._master(held[name].detach()[begin:end], mine)
            self.divided[name] = DTensor.from_local(
                self.parameters[name].detach(),
                self._mesh(world),
                [Shard(0)],
                run_check=False,
                shape=working.shape,
                stride=working.stride(),
            )
            del held[name]
        blocks = list(blocks)
        groups = grouped(model, blocks, [name for name in self.working if name not in apart])
        self._exchange = GradientExchange(self.working, groups, self._sum_rows)
        self._apart = {name: self.working[name] for name in self.working if name in apart}
        self._sums_apart: dict[str, Tensor] = {}
        self._cuda = next(iter(self.working.values())).is_cuda
        outside = len(groups) - len(blocks)
        self._outside, inside = groups[:outside], groups[outside:]
        self._inside = {id(block): names for block, names in zip(blocks, inside, strict=True)}
        self._arriving: dict[str, list[Any]] = {}  # first name of a group → messages that its weights come by
        self.refresh()

    def _mesh(self, world: World) -> DeviceMesh:
        """The processes that have the other rows, by where this process keeps its own."""
        assert world.sharing is not None
        return world.sharing["shard"]

    def _master(self, held: Tensor, mine: Tensor) -> nn.Parameter:
        """What the optimizer updates.

        Args:
            held: this process's rows of the initialised weights.
            mine: of the model's.
        """
        if held.dtype == mine.dtype:
            return nn.Parameter(mine, requires_grad=False)
        master = nn.Parameter(held.clone(), requires_grad=False)
        self._copies[master] = mine
        return master

    @torch.no_grad()
    def _replace(
        self, held: dict[str, nn.Parameter], dtype: torch.dtype, apart: Collection[str], device: torch.device | None
    ) -> None:
        """Give the model parameters in `dtype`, those that are trained with memory behind their last row."""
        names, made = {id(parameter): name for name, parameter in held.items()}, {}
        for module in self.model.modules():
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                name = names[id(parameter)]
                if name in apart and device is None:
                    continue
                if name in apart:
                    made[name] = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                elif name not in made:
                    made[name] = self._widened(name, parameter, dtype, device or parameter.device)
                setattr(module, attribute, made[name])

    def _widened(self, name: str, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        if not parameter.requires_grad:
            return nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
        rows = -(-parameter.shape[0] // self.size) * self.size
        storage = parameter.new_zeros(rows, *parameter.shape[1:], dtype=dtype, device=device)
        self._storages[name] = storage
        found = nn.Parameter(storage[: parameter.shape[0]])
        found.data.copy_(parameter)
        return found

    # Gradients

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch."""
        self._exchange.begin(active=last or self.zero == 2)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch off the model."""
        self._exchange.finish()
        for name, working in self._apart.items():
            if working.grad is not None:
                gradient, sums = wide(working.grad), self._sums_apart
                sums[name] = sums[name].add_(gradient) if name in sums else gradient
                working.grad = None

    def _sum_rows(self, found: Found) -> dict[str, Tensor]:
        """This process's rows of the sums of gradients over all processes."""
        parts = [[self._rows(gradient, rank) for _, gradient in found] for rank in range(self.size)]
        numbers, mine = [sum(part.numel() for part in theirs) for theirs in parts], parts[self.rank]
        sent = torch.cat([part.reshape(-1) for theirs in parts for part in theirs])
        arrived = sent.new_empty(self.size, numbers[self.rank])  # by rank, so that all processes sum in the same order
        dist.all_to_all_single(arrived.view(-1), sent, [numbers[self.rank]] * self.size, numbers, group=self.group)
        summed = arrived.sum(0, dtype=torch.promote_types(arrived.dtype, torch.float32))
        for copies in self.copies_of:
            dist.all_reduce(summed, group=copies)
        rows = zip(found, summed.split([part.numel() for part in mine]), mine, strict=True)
        return {name: row.view(part.shape) for (name, _), row, part in rows}

    def _rows(self, gradient: Tensor, rank: int) -> Tensor:
        """The rows of a parameter that a process has."""
        return gradient[slice(*rows_of(gradient.shape[0], rank, self.size))]

    def gradients(self) -> dict[str, Tensor]:
        """This process's rows of every parameter that the step has reached."""
        self.accumulate()
        sums = {**self._exchange.wait(), **self._sums_apart}
        return {name: sums[name] for name in self.working if name in sums}

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._exchange.clear()
        self._sums_apart = {}
        for working in self.working.values():
            working.grad = None

    # Weights

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The rows of the model's weights behind every master."""
        return self._copies

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to gather weights that have changed; who uses them waits by `ready` and `ready_outside`."""
        self.wait()
        for names in (*self._outside, *self._inside.values()):
            parts = []
            for name in names:
                storage, each = self._storages[name], self._storages[name].shape[0] // self.size
                parts.append((storage, storage[self.rank * each : (self.rank + 1) * each]))
            if parts:
                self._arriving[names[0]] = self._gathered(parts)

    def _gathered(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        """Messages, on a GPU a single one, that put all processes' second tensors into the first."""
        if not self._cuda:
            return [all_gather_single(to, part, group=self.group, async_op=True) for to, part in parts]
        with dist._coalescing_manager(group=self.group, async_ops=True) as together:  # type: ignore[attr-defined]
            for to, part in parts:
                all_gather_single(to, part, group=self.group)
        return [together]

    def ready(self, block: nn.Module) -> None:
        """Wait for a block's weights."""
        self._wait([self._inside[id(block)]])

    def ready_outside(self) -> None:
        """Wait for the weights that are in no block."""
        self._wait(self._outside)

    def wait(self) -> None:
        """Wait for all weights."""
        self._wait([*self._outside, *self._inside.values()])

    def _wait(self, groups: Iterable[Sequence[str]]) -> None:
        for names in groups:
            for work in self._arriving.pop(names[0], ()) if names else ():
                work.wait()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy what was set to the whole weights."""
        for master, mine in self.copies().items():
            mine.copy_(master)
        self.gather()
        self.wait()

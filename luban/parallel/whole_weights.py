"""ZeRO 1 and 2 (Rajbhandari et al. 2020): weights are whole in every process, in the dtype of the matmuls; fp32 weights, gradients and
optimizer state are divided.

Of a parameter with n rows process r of N has rows r·c to (r + 1)·c, c = ⌈n/N⌉. Nothing is copied to be sent. As soon as the
backward pass has the gradients of a layer, their rows go from where they are to the processes that have them, in the
dtype in which they were computed, and are summed there in fp32. The optimizer writes its rows of the whole weights, which are gathered
in place, layer by layer, while the next step begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from luban.nn.init import FindRegion, Region, whole
from luban.parallel.sharded_params import ShardedParams
from luban.parallel.world import World

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
IN_FLIGHT = 2  # groups whose gradients may be on their way while a third begins


@dataclass
class Group:
    """Parameters whose messages go together."""

    names: list[str]
    missing: int = 0  # gradients of this micro-batch that the backward pass has still to compute
    sent: bool = False  # they are on their way
    gathering: list[Any] = field(default_factory=list)  # messages that the weights' next use waits for


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Begin and end of the rows that one of `size` processes has of `count`."""
    each = -(-count // size)
    return min(rank * each, count), min((rank + 1) * each, count)


def own_rows(model: nn.Module, world: World, apart: Collection[str]) -> FindRegion:
    """The rows of every parameter that this process has: what it must draw of a model, as `WholeWeights` gathers the others'."""
    assert world.sharing is not None
    group = world.sharing.get_group("shard")
    divided = {name for name, p in model.named_parameters() if p.requires_grad and name not in apart}

    def find(name: str, tensor: Tensor) -> Region:
        if name not in divided:
            return whole(name, tensor)
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
    ):
        assert world.sharing is not None
        self.model, self.fixed, self.zero = model, fixed, zero
        self.group, self.copies_of = world.sharing.get_group("shard"), world.sharing_groups("replicate")
        self.rank, self.size = dist.get_rank(self.group), self.group.size()
        held = dict(model.named_parameters())
        self._storages: dict[str, Tensor] = {}
        self._replace(held, dtype, apart)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters, self.divided, self._copies = {}, {}, {}
        for name, working in self.working.items():
            if name in apart:
                self.divided[name], self.parameters[name] = working, nn.Parameter(working.detach(), requires_grad=False)
                continue
            begin, end = rows_of(working.shape[0], self.rank, self.size)
            mine = self._storages[name][begin:end]
            master = mine if held[name].dtype == dtype else held[name].detach()[begin:end].clone()
            self.parameters[name] = nn.Parameter(master, requires_grad=False)
            if master is not mine:
                self._copies[self.parameters[name]] = mine
            self.divided[name] = DTensor.from_local(
                self.parameters[name].detach(),
                world.sharing["shard"],
                [Shard(0)],
                run_check=False,
                shape=working.shape,
                stride=working.stride(),
            )
            del held[name]
        self._groups = self._grouped(blocks, apart)
        self._of = {name: group for group in self._groups for name in group.names}
        self._exchanging = True
        self._sums: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}  # ZeRO 1: sums of the micro-batches before the last
        self._cuda = next(iter(self.working.values())).is_cuda
        self._stream = torch.cuda.Stream() if self._cuda else None
        self._in_flight: list[tuple[Any, Any]] = []  # gradients, and when they have been sent
        for name, working in self.working.items():
            if name in self._of:
                working.register_post_accumulate_grad_hook(self._hook(self._of[name]))
        self.refresh()

    @torch.no_grad()
    def _replace(self, held: dict[str, nn.Parameter], dtype: torch.dtype, apart: Collection[str]) -> None:
        """Give the model parameters in `dtype`, those that are trained with memory behind their last row."""
        names, made = {id(parameter): name for name, parameter in held.items()}, {}
        for module in self.model.modules():
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                name = names[id(parameter)]
                if name in apart:
                    continue
                if name not in made:
                    made[name] = self._widened(name, parameter, dtype)
                setattr(module, attribute, made[name])

    def _widened(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if not parameter.requires_grad:
            return nn.Parameter(parameter.to(dtype), requires_grad=False)
        rows = -(-parameter.shape[0] // self.size) * self.size
        storage = parameter.new_zeros(rows, *parameter.shape[1:], dtype=dtype)
        self._storages[name] = storage
        found = nn.Parameter(storage[: parameter.shape[0]])
        found.data.copy_(parameter)
        return found

    def _grouped(self, blocks: Iterable[nn.Module], apart: Collection[str]) -> list[Group]:
        names = {id(parameter): name for name, parameter in self.working.items() if name not in apart}
        inside: dict[str, list[str]] = {}
        self._block: dict[int, Group] = {}
        for block in blocks:
            own = [names.pop(id(p)) for p in block.parameters() if id(p) in names]
            self._block[id(block)] = Group(own)
            inside |= dict.fromkeys(own, own)
        rest = [Group([name]) for name in names.values()]
        self._root = rest
        return [*rest, *(group for group in self._block.values() if group.names)]

    # Gradients

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch."""
        self._exchanging = last or self.zero == 2
        for group in self._groups:
            group.missing, group.sent = len(group.names), False

    def _hook(self, group: Group) -> Callable[[nn.Parameter], None]:
        def arrived(_parameter: nn.Parameter) -> None:
            group.missing -= 1
            if group.missing == 0 and self._exchanging:
                self._send(group)

        return arrived

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch off the model."""
        if self._exchanging:
            for group in self._groups:  # those of which the backward pass has reached a part alone
                if not group.sent:
                    self._send(group)
        else:
            for name, working in self.working.items():
                if name in self._of and working.grad is not None:
                    gradient = self._wide(working.grad)
                    self._whole[name] = self._whole[name].add_(gradient) if name in self._whole else gradient
                    working.grad = None
        for name, working in self.working.items():
            if name not in self._of and working.grad is not None:  # held apart
                gradient = self._wide(working.grad)
                self._sums[name] = self._sums[name].add_(gradient) if name in self._sums else gradient
                working.grad = None

    @torch.no_grad()
    def _send(self, group: Group) -> None:
        """Send gradients to the processes that have their rows, and sum what arrives."""
        group.sent = True
        found: list[tuple[str, Tensor]] = []
        for name in group.names:
            working = self.working[name]
            gradient, before = working.grad, self._whole.pop(name, None)
            working.grad = None
            if before is not None:
                gradient = before if gradient is None else before.add_(gradient)
            if gradient is not None:
                found.append((name, gradient.contiguous()))
        if not found:
            return
        if self._stream is None:
            self._exchange(found)
            return
        computing = torch.cuda.current_stream()
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            self._exchange(found)
            self._in_flight.append((self._stream.record_event(), found))
        while len(self._in_flight) > IN_FLIGHT:  # their memory is used again after they have been sent
            sent, _ = self._in_flight.pop(0)
            computing.wait_event(sent)

    def _exchange(self, found: Sequence[tuple[str, Tensor]]) -> None:
        """See `_send`."""
        mine = [gradient[slice(*rows_of(gradient.shape[0], self.rank, self.size))] for _, gradient in found]
        sizes = [part.numel() for part in mine]
        like = found[0][1]
        arrived = like.new_empty(self.size - 1, sum(sizes))
        operations: list[dist.P2POp] = []
        for distance in range(1, self.size):
            to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            rows = arrived[distance - 1].split(sizes)
            for tag, ((_, gradient), part) in enumerate(zip(found, rows, strict=True)):
                theirs = gradient[slice(*rows_of(gradient.shape[0], to, self.size))]
                if theirs.numel():
                    operations.append(
                        dist.P2POp(dist.isend, theirs, group=self.group, group_peer=to, tag=tag)  # type: ignore[arg-type]
                    )
                if part.numel():
                    operations.append(
                        dist.P2POp(dist.irecv, part, group=self.group, group_peer=source, tag=tag)  # type: ignore[arg-type]
                    )
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        summed = torch.cat([self._wide(part.reshape(-1)) for part in mine])
        for row in arrived:
            summed += row
        for copies in self.copies_of:
            dist.all_reduce(summed, group=copies)
        for (name, _), part, own in zip(found, summed.split(sizes), mine, strict=True):
            part = part.view(own.shape)
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    @staticmethod
    def _wide(gradient: Tensor) -> Tensor:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    def gradients(self) -> dict[str, Tensor]:
        """This process's rows of every parameter that the step has reached."""
        self.accumulate()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._in_flight.clear()
        return {name: self._sums[name] for name in self.working if name in self._sums}

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums, self._whole = {}, {}
        for working in self.working.values():
            working.grad = None

    # Weights

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """The rows of the model's weights behind every master."""
        return self._copies

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to gather weights that have changed; who uses them waits by `ready` and `ready_outside`."""
        self._wait(self._groups)
        for group in self._groups:
            parts = []
            for name in group.names:
                storage, each = self._storages[name], self._storages[name].shape[0] // self.size
                parts.append((storage, storage[self.rank * each : (self.rank + 1) * each]))
            group.gathering = self._gathered(parts)

    def _gathered(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
        """Messages, on a GPU a single one, that put all processes' second tensors into the first."""
        if not self._cuda:
            return [all_gather(to, part, group=self.group, async_op=True) for to, part in parts]
        with dist._coalescing_manager(group=self.group, async_ops=True) as together:  # type: ignore[attr-defined]
            for to, part in parts:
                all_gather(to, part, group=self.group)
        return [together]

    def ready(self, block: nn.Module) -> None:
        """Wait for a block's weights."""
        self._wait([self._block[id(block)]])

    def ready_outside(self) -> None:
        """Wait for the weights that are in no block."""
        self._wait(self._root)

    def _wait(self, groups: Iterable[Group]) -> None:
        for group in groups:
            for work in group.gathering:
                work.wait()
            group.gathering = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy what was set to the whole weights."""
        for master, mine in self._copies.items():
            mine.copy_(master)
        self.gather()
        self._wait(self._groups)

"""Hidden states and their gradients, sent from stage to stage of a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIMENSIONS = 6  # of a tensor, at most
STACKS = 4  # of a model, at most
FIRST = 1 << 20  # the number of the message with the shapes: more than there are micro-batches
Like = tuple[torch.dtype, Sequence[int]]  # dtype and shape


class Channels:
    """What one process of a pipeline sends to and receives from others, by stages.

    Receivers learn the shapes of hidden states from a message before the first; later ones of a batch with the same shapes
    have the same. NCCL delivers in the order of sending alone, so that there every two stages and direction have a group of
    their own; Gloo tells messages apart by tags.

    Args:
        links: (source, target), the stages between which hidden states go.
        group: the processes of the pipeline.
    """

    def __init__(self, links: Collection[tuple[int, int]], group: dist.ProcessGroup, device: torch.device):
        self.device, self.processes = device, group.size()
        self.ordered = dist.get_backend(group) == "nccl"
        pairs = [pair for link in sorted(set(links)) for pair in (link, link[::-1])]
        self.lines = {pair: number for number, pair in enumerate(pairs)}
        self.groups = [_again(group) for _ in pairs] if self.ordered else [group]
        self.shapes: dict[tuple[int, int, int, Hashable], Like] = {}
        self.sending: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, stage: int, to: int, number: int, stack: int, tensor: Tensor) -> None:
        """Send what stage `stage` computed of micro-batch `number` and a stack to stage `to`."""
        self._send(stage, to, number * STACKS + stack, tensor.detach().contiguous())

    def receive(self, stage: int, by: int, number: int, stack: int, like: Like) -> Tensor:
        """What stage `by` sent to `stage`, of this dtype and shape."""
        dtype, shape = like
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        group, tag = self._line(by, stage, number * STACKS + stack)
        dist.recv(tensor, group=group, group_src=by % self.processes, tag=tag)
        return tensor

    def tell_shape(self, stage: int, to: int, stack: int, key: Hashable, tensor: Tensor) -> None:
        """Before the first hidden states of a kind of micro-batch (`key`) go from `stage` to another."""
        if (stage, to, stack, key) in self.shapes:
            return
        self.shapes[stage, to, stack, key] = tensor.dtype, tensor.shape
        row = [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
        row += [0] * (DIMENSIONS + 2 - len(row))
        self.send(stage, to, FIRST, stack, torch.tensor(row, device=self.device))

    def hear_shape(self, stage: int, by: int, stack: int, key: Hashable) -> Like:
        """Dtype and shape of the hidden states that come from stage `by` to `stage`."""
        if (by, stage, stack, key) not in self.shapes:
            row = self.receive(stage, by, FIRST, stack, (torch.int64, [DIMENSIONS + 2])).tolist()
            self.shapes[by, stage, stack, key] = DTYPES[row[0]], row[2 : 2 + row[1]]
        return self.shapes[by, stage, stack, key]

    def wait(self) -> None:
        """Until all that was sent has left."""
        for work, _ in self.sending:
            if work is not None:
                work.wait()
        self.sending.clear()

    def _send(self, stage: int, to: int, number: int, tensor: Tensor) -> None:
        # memory of what has left isn't needed until the step's end (Gloo says that it has only once one waits)
        self.sending = [(work, sent) for work, sent in self.sending if work is not None and not work.is_completed()]
        group, tag = self._line(stage, to, number)
        self.sending.append((dist.isend(tensor, group=group, group_dst=to % self.processes, tag=tag), tensor))

    def _line(self, source: int, target: int, number: int) -> tuple[dist.ProcessGroup, int]:
        """The group and the tag of a message between two stages."""
        line = self.lines[source, target]
        return (self.groups[line], 0) if self.ordered else (self.groups[0], number * len(self.lines) + line)


def alike_groups(mine: Collection[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """New groups of processes, by their ranks in the run. Every process of the run must call it, with those that it is in (or none);
    it gets these."""
    asked: list[list[tuple[int, ...]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(asked, sorted(mine))
    found = {}
    for ranks in sorted({ranks for each in asked for ranks in each}):
        group = dist.new_group(list(ranks))
        if ranks in mine:
            assert isinstance(group, dist.ProcessGroup)
            found[ranks] = group
    return found


def _again(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Another group of the same processes."""
    ranks = tuple(dist.get_process_group_ranks(group))
    return alike_groups({ranks})[ranks]

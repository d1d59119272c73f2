"""Hidden states and their gradients, sent from stage to stage of a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from luban.core.plan import ParallelPlan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIMENSIONS = 6  # of a tensor, at most


class Channels:
    """What one process sends to and receives from its neighbours.

    Receivers learn the shapes of hidden states from a message before the first; later ones of a batch with the same shapes
    have the same. NCCL delivers in the order of sending alone, so that there every boundary and direction has a group of
    its own; Gloo tells messages apart by tags.
    """

    def __init__(self, plan: ParallelPlan, group: dist.ProcessGroup, device: torch.device):
        self.plan, self.device = plan, device
        self.ordered = dist.get_backend(group) == "nccl"
        links = 2 * (plan.stages - 1) if self.ordered else 1
        self.groups = [group] if links == 1 else [_again(group) for _ in range(links)]
        self.shapes: dict[tuple[int, Hashable], list[tuple[torch.dtype, list[int]]]] = {}
        self.sending: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, stage: int, to: int, number: int, tensors: Sequence[Tensor]) -> None:
        """Send what stage `stage` computed of micro-batch `number` to the next stage or the one before."""
        for k, tensor in enumerate(tensors):
            self._send(stage, to, number * 4 + k, tensor.detach().contiguous())

    def receive(
        self, stage: int, by: int, number: int, like: Sequence[tuple[torch.dtype, Sequence[int]]]
    ) -> list[Tensor]:
        """What stage `by` sent to `stage`, of these dtypes and shapes."""
        found = []
        for k, (dtype, shape) in enumerate(like):
            tensor = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            group, tag = self._line(by, stage, number * 4 + k)
            dist.recv(tensor, group=group, group_src=by % self.plan.pipeline, tag=tag)
            found.append(tensor)
        return found

    def tell_shapes(self, stage: int, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Before the first hidden states of a kind of micro-batch go from `stage` to the next."""
        if (stage, key) in self.shapes:
            return
        self.shapes[stage, key] = [(t.dtype, list(t.shape)) for t in tensors]
        for k, tensor in enumerate(tensors):
            row = [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
            row += [0] * (DIMENSIONS + 2 - len(row))
            self._send(stage, stage + 1, 4 * FIRST + k, torch.tensor(row, device=self.device))

    def hear_shapes(self, stage: int, key: Hashable, count: int) -> list[tuple[torch.dtype, list[int]]]:
        """The shapes of the hidden states that come to `stage`."""
        if (stage - 1, key) not in self.shapes:
            like = [(torch.int64, [DIMENSIONS + 2])] * count
            rows = [row.tolist() for row in self.receive(stage, stage - 1, FIRST, like)]
            self.shapes[stage - 1, key] = [(DTYPES[row[0]], row[2 : 2 + row[1]]) for row in rows]
        return self.shapes[stage - 1, key]

    def wait(self) -> None:
        """Until all that was sent has left."""
        for work, _ in self.sending:
            if work is not None:
                work.wait()
        self.sending.clear()

    def _send(self, stage: int, to: int, number: int, tensor: Tensor) -> None:
        group, tag = self._line(stage, to, number)
        self.sending.append((dist.isend(tensor, group=group, group_dst=to % self.plan.pipeline, tag=tag), tensor))

    def _line(self, source: int, target: int, number: int) -> tuple[dist.ProcessGroup, int]:
        """The group and the tag of a message between neighbouring stages."""
        line = 2 * min(source, target) + (target < source)
        return (self.groups[line], 0) if self.ordered else (self.groups[0], number * 2 * self.plan.stages + line)


FIRST = 1 << 20  # the number of the message with the shapes: more than there are micro-batches


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

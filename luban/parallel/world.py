"""The processes of a run: who this one is, and what they agree on.

Legend: R processes that read different rows of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luban.core.plan import ParallelPlan
from luban.optim.clip import global_norm

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # after which a process that waits for another gives up
BUCKET = 1 << 25  # numbers summed by one all-reduce


def process_count() -> int:
    """How many processes torchrun (or `--nproc`) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/transport", "Connection reset", "Connection closed", "Timed out waiting")
    )


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them. The default is a run of one process."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # replicate × shard; none: one process

    @classmethod
    def join(cls, plan: ParallelPlan, device: torch.device) -> World:
        """Meet the other processes of the run.

        Args:
            plan: one that fits the number of processes (`ParallelPlan.over`).
            device: of this process.
        """
        size = process_count()
        if size == 1:
            return cls()
        if not dist.is_initialized():
            on_cuda = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_cuda else "gloo", timeout=TIMEOUT, device_id=device if on_cuda else None
            )
        mesh = init_device_mesh(device.type, (plan.replicate, plan.shard), mesh_dim_names=("replicate", "shard"))
        return cls(rank=dist.get_rank(), size=size, mesh=mesh)

    @staticmethod
    def leave() -> None:
        """Close the connections to the other processes, at the end of a run that went well."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether several processes divide one copy of the model."""
        return self.mesh is not None and self.mesh["shard"].size() > 1

    def agree(self, value: T) -> T:
        """The main process's value, in every process. It must be picklable."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of tensors whose rows come first, a multiple of R of them."""
        if self.size == 1:
            return dict(tensors)
        return {name: tensor.chunk(self.size)[self.rank] for name, tensor in tensors.items()}

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def sum_gradients(self, gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """The sums over the copies of the model, in fp32 (fp64 for fp64). Sharded ones are summed by FSDP already."""
        if self.size == 1 or self.sharded:
            return dict(gradients)
        summed: dict[nn.Parameter, Tensor] = {}
        for bucket in _buckets(gradients):
            tensors = [gradients[p] for p in bucket]
            flat = torch.cat([t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors])
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in tensors])
            summed |= {p: part.view(t.shape) for p, part, t in zip(bucket, parts, tensors, strict=True)}
        return summed

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global norm of summed gradients, of which this process may hold shards."""
        norm = global_norm(gradients)
        if not self.sharded:
            return norm
        assert self.mesh is not None
        squared = norm.square()
        dist.all_reduce(squared, group=self.mesh.get_group("shard"))
        return squared.sqrt()


def _buckets(gradients: Mapping[nn.Parameter, Tensor]) -> list[list[nn.Parameter]]:
    """Parameters in order, about BUCKET numbers together, each bucket of one dtype."""
    found: list[list[nn.Parameter]] = []
    held, last = 0, None
    for parameter, gradient in gradients.items():
        if not found or held + gradient.numel() > BUCKET or gradient.dtype != last:
            found.append([])
            held = 0
        found[-1].append(parameter)
        held, last = held + gradient.numel(), gradient.dtype
    return found

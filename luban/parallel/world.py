"""The processes of a run: who this one is, and what they agree on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luban.core.plan import AXES, ParallelPlan
from luban.parallel.meeting import meet, require_same

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # after which a process that waits for another gives up
PEER_CHANNELS = "16"  # of point-to-point messages: the ring of 256 MB over two H200 went from 166 to 193 GB/s


def process_count() -> int:
    """How many processes torchrun (or `--nproc`) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/transport", "Connection reset", "Connection closed", "Timed out waiting")
    )


def described_loss(error: BaseException) -> str:
    """What a lost connection says of the other process, for the person who reads it: without paths of a library's sources."""
    text = (
        re.sub(r"^\[[^]]*\.cc:\d+\] *", "", str(error).splitlines()[0]).partition(" This is typically")[0].rstrip(".")
    )
    if "Timed out" in text:
        return f"has not answered for {TIMEOUT.total_seconds() / 60:.0f} minutes, and may hang: {text}"
    return f"has ended: {text}"


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them. The default is a run of one process.

    Gradients are summed over copies of the model and over the processes of the axis context. Where parameters are
    divided over the axis shard, the processes of context divide them, too; else they count as copies.
    """

    plan: ParallelPlan = field(default_factory=ParallelPlan)
    rank: int = 0
    mesh: DeviceMesh | None = None  # the axes with several processes; none: one process
    # the same processes by how they share parameters: pipeline × copies × shards × tensor
    sharing: DeviceMesh | None = None
    store: dist.Store | None = None  # that the processes met in
    # the same processes by their experts: pipeline × those that hold the same ones × expert; none: plan.expert is 1
    experts: DeviceMesh | None = None

    @classmethod
    def join(
        cls,
        plan: ParallelPlan,
        device: torch.device,
        same: Mapping[str, Any] | None = None,
        store: dist.Store | None = None,
    ) -> World:
        """Meet the other processes of the run.

        Args:
            plan: one that fits the number of processes (`ParallelPlan.over`).
            device: of this process.
            same: what must be alike in all processes, by what it is called.
            store: that they meet in; None: the one that torchrun (or `--nproc`) names.

        Raises:
            ConfigError: it isn't; the message names the process.
            TrainingError: a process has not come within 10 minutes; the message names it.
        """
        if process_count() == 1:
            return cls()
        if not dist.is_initialized():
            on_cuda = device.type == "cuda"
            if on_cuda:  # NCCL's own choice leaves half of NVLink idle between two processes
                os.environ.setdefault("NCCL_NCHANNELS_PER_PEER", PEER_CHANNELS)
            if store is None:
                store = meet(process_rank(), process_count(), TIMEOUT)
            dist.init_process_group(
                "nccl" if on_cuda else "gloo",
                store=dist.PrefixStore("collectives", store),
                rank=process_rank(),
                world_size=process_count(),
                timeout=TIMEOUT,
                device_id=device if on_cuda else None,
            )
        require_same({"plan": plan, **(same or {})})
        sizes: dict[str, int] = dict(zip(AXES, plan.sizes, strict=True))
        mesh = _mesh(device, sizes)
        experts = None
        if plan.expert > 1:
            shape = (plan.pipeline, plan.processes // plan.pipeline // plan.expert, plan.expert)
            experts = init_device_mesh(device.type, shape, mesh_dim_names=("pipeline", "copies", "expert"))
        if plan.context == 1:
            return cls(plan, dist.get_rank(), mesh, mesh, store, experts)
        divided = "shard" if plan.shard > 1 else "replicate"
        sizes[divided] *= sizes.pop("context")
        return cls(plan, dist.get_rank(), mesh, _mesh(device, sizes), store, experts)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.plan.processes

    @staticmethod
    def leave() -> None:
        """Close the connections to the other processes, at the end of a run that went well."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what the run leaves."""
        return self.rank == 0

    def index(self, axis: str) -> int:
        """The index of this process along an axis of the plan."""
        return self.plan.place(self.rank)[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes that differ from this one along an axis of the plan alone; the axis has several."""
        assert self.mesh is not None
        return self.mesh.get_group(axis)

    def sharing_groups(self, *axes: str) -> list[dist.ProcessGroup]:
        """The groups along those of the axes of `sharing` that have several processes."""
        if self.sharing is None:
            return []
        names = self.sharing.mesh_dim_names or ()
        return [self.sharing.get_group(axis) for axis in axes if axis in names]

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The processes that FSDP divides parameters among, and their copies."""
        assert self.sharing is not None
        return self.sharing["replicate", "shard"] if self.copies > 1 else self.sharing["shard"]

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The processes among which the experts are divided."""
        assert self.experts is not None
        return self.experts.get_group("expert")

    @property
    def shards(self) -> int:
        """Among how many processes FSDP divides the parameters."""
        return self.plan.shard * self.plan.context if self.plan.shard > 1 else 1

    @property
    def copies(self) -> int:
        """How many processes hold the same part of the parameters."""
        return self.plan.replicate * (1 if self.plan.shard > 1 else self.plan.context)

    @property
    def counts(self) -> bool:
        """Whether this process's loss counts: of the processes of the axis tensor, which all compute it, the first's does."""
        return self.index("tensor") == 0

    def agree(self, value: T) -> T:
        """The main process's value, in every process. It must be picklable."""
        if self.size == 1:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process. They must be picklable."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def host_group(self) -> dist.ProcessGroup | None:
        """Another group of all processes, over Gloo, for a thread that must not get in the way of training; None: there are no
        others. Every process must ask for it."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of tensors whose rows come first, a multiple of `plan.readers` of them."""
        if self.plan.readers == 1:
            return dict(tensors)
        return {name: tensor.chunk(self.plan.readers)[self.reader] for name, tensor in tensors.items()}

    @property
    def reader(self) -> int:
        """Which part of a batch's rows this process reads."""
        return self.index("replicate") * self.plan.shard + self.index("shard")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor


def _mesh(device: torch.device, sizes: Mapping[str, int]) -> DeviceMesh:
    """A mesh of the axes that have several processes."""
    several = {axis: size for axis, size in sizes.items() if size > 1}
    return init_device_mesh(device.type, tuple(several.values()), mesh_dim_names=tuple(several))

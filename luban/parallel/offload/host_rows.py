"""ZeRO-Offload over several processes (Ren et al. 2021, section 4.2): each keeps and updates its rows of the fp32 weights and moments on
the host.

Weights are whole on every device in the dtype of the matmuls, as at ZeRO 1 and 2. The gradients of a layer are summed to the processes
that have their rows while the backward pass goes on, and this process's rows of the sums leave for the host. Rows that were updated
there are rounded, copied to the device and gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from luban.core.plan import ParallelPlan
from luban.optim.base import Optimizer
from luban.parallel.exchange import Found
from luban.parallel.offload.pools import HostPool, places
from luban.parallel.offload.streamed import keep_moments
from luban.parallel.offload.sums import HostSums
from luban.parallel.remat.host import Streams
from luban.parallel.whole_weights import WholeWeights, rows_of
from luban.parallel.world import World


class HostRows(WholeWeights):
    """`WholeWeights` whose masters lie in a pool.

    Args:
        model, blocks, world, zero, dtype, fixed, apart: as of `WholeWeights`; the model's parameters are on the CPU, and afterwards it
            is on the device. What is `apart` has its master in the pool whole, and its gradients leave at the end of a step.
        device: that computes.
        plan: says where masters, moments and sums of gradients are.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        world: World,
        *,
        zero: int,
        dtype: torch.dtype,
        device: torch.device,
        plan: ParallelPlan,
        fixed: Collection[str] = frozenset(),
        apart: Collection[str] = frozenset(),
    ):
        assert world.sharing is not None
        mesh = world.sharing["shard"]
        rows = partial(_rows, rank=mesh.get_local_rank(), size=mesh.size())
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.streams = Streams(device)
        masters = [p if name in apart else rows(p) for name, p in trained.items()]
        self.places = places(plan, device, masters, [])
        del trained, masters
        self._leaving = HostSums(self.streams, delayed=plan.offload_delay, pool=self.places.sums)
        self._staged: dict[nn.Parameter, Tensor] = {}
        super().__init__(model, blocks, world, zero=zero, dtype=dtype, fixed=fixed, apart=apart, device=device)
        self.messages = mesh
        model.to(device)
        if self.streams.cuda:
            staging = HostPool(True, sum(rows.numel() * rows.dtype.itemsize for rows in self._copies.values()))
            for master, rows in self._copies.items():
                self._staged[master] = staging.zeros(rows.shape, rows.dtype).copy_(rows)

    def keep_moments(self, optimizer: Optimizer) -> None:
        """Put Adam's moments into the pool."""
        keep_moments(optimizer, self.places.state)

    def _mesh(self, world: World) -> DeviceMesh:
        mesh = super()._mesh(world)
        return DeviceMesh.from_group(mesh.get_group(), "cpu") if self.streams.cuda else mesh

    def _master(self, held: Tensor, mine: Tensor) -> nn.Parameter:
        master = nn.Parameter(self.places.state.zeros(held.shape, held.dtype).copy_(held), requires_grad=False)
        self._copies[master] = mine
        return master

    def _sum_rows(self, found: Found) -> dict[str, Tensor]:
        """This process's rows of the sums, on their way to the host; none stay."""
        for name, rows in super()._sum_rows(found).items():
            self._leaving.leave(name, rows)
        return {}

    def accumulate(self) -> None:
        """Wait until the gradients that have left are in the step's sums."""
        super().accumulate()
        self._leaving.wait()

    def gradients(self) -> dict[str, Tensor]:
        """This process's rows of every parameter that the step has reached, on the host; those of a later step take their place."""
        apart = super().gradients()
        sums = {**self._leaving.wait(), **{name: gradient.cpu() for name, gradient in apart.items()}}
        return {name: sums[name] for name in self.working if name in sums}  # in all processes in the same order

    def clear(self) -> None:
        """Forget the step's gradients."""
        super().clear()
        self._leaving.clear()

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """What `gather` copies to the model, behind every master."""
        return {**self._copies, **self._staged}

    @torch.no_grad()
    def gather(self) -> None:
        """Copy what was rounded on the host to the device, and begin to gather it."""
        self.wait()
        for master, staged in self._staged.items():
            self._copies[master].copy_(staged, non_blocking=True)
        super().gather()


def _rows(whole: Tensor, rank: int, size: int) -> Tensor:
    """Those that a process has."""
    return whole[slice(*rows_of(whole.shape[0], rank, size))]

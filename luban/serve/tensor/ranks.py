"""The processes that hold one model, as one of them sees them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from luban.core.errors import UsageError
from luban.parallel.collectives import Peers
from luban.parallel.heads import HeadRange
from luban.parallel.world import TIMEOUT

HOST = "127.0.0.1"  # all are on this machine


def make_store() -> dist.TCPStore:
    """What the first process lets the others meet in."""
    return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


class Ranks:
    """One of the processes. Tensors are sent through NCCL between GPUs, else through Gloo; numbers always through Gloo.

    Args:
        rank: of this process. size: of all.
        device: of this process.
        store: that they meet in; None: that at `port`.

    Raises:
        UsageError: this process takes part in another group already.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store | None = None, port: int = 0):
        if dist.is_initialized():
            raise UsageError(
                "this process has a torch.distributed group already (a training run, or another engine with a plan): "
                "close that first"
            )
        self.rank, self.size, self.device = rank, size, device
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store or dist.TCPStore(HOST, port, is_master=False, timeout=TIMEOUT),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if on_cuda else None,
        )
        group, host = dist.group.WORLD, dist.new_group(backend="gloo", timeout=TIMEOUT) if on_cuda else None
        assert group is not None
        self.group, self._host = group, host or group
        self.peers = Peers.of(group)

    @property
    def heads(self) -> HeadRange:
        """The heads that are here."""
        return HeadRange(self.peers)

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers; all ask."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._host)
        return int(found)

    def agree(self, fine: bool) -> bool:
        """Whether it is so in all; all ask."""
        return bool(self.smallest(int(fine)))

    def leave(self, *, lost: bool) -> None:
        """Close the connections; `lost`: a process is gone. NCCL would wait for it."""
        if dist.is_initialized() and not (lost and self.device.type == "cuda"):
            dist.destroy_process_group()

    def abort(self) -> None:
        """End what waits for a process that is gone, from another thread. Gloo notices by itself."""
        if self.device.type == "cuda":
            self.group.abort()

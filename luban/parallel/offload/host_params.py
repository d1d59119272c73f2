"""fp32 weights outside of the device, whose gradients leave it layer by layer (Ren et al. 2021, ZeRO-Offload).

The device holds weights in the dtype of the matmuls, and the gradients of the layer whose backward pass runs. As soon as the gradient
of a parameter is complete, a hook copies it to the host, on a stream of its own on a GPU, and frees it; a thread adds it to the step's
fp32 sums while the backward pass goes on. Adam runs on the host, in torch's vectorised and threaded kernel, and rounds what it has
updated to the dtype of the matmuls there; that is copied back. All of this memory is taken once: new pages cost more than the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from luban.optim.base import Optimizer
from luban.parallel.offload.pools import HostPool, Pool, training_bytes
from luban.parallel.offload.streamed import keep_moments
from luban.parallel.offload.sums import HostSums
from luban.parallel.offload.tiles import tiled_weights
from luban.parallel.precision import MixedPrecisionParams
from luban.parallel.remat.host import Streams


class HostParams(MixedPrecisionParams):
    """`MixedPrecisionParams` whose masters lie in a pool.

    Args:
        model: with initialised fp32 (or fp64) parameters on the CPU; afterwards its parameters are on the device.
        device: that computes.
        pool: bytes that it must hold → the pool of the masters and of the optimizer's moments.
        delayed: sums stay as they are while the next step's are made (`DelayedOptimizer`).
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        pool: Callable[[int], Pool],
        *,
        fixed: Collection[str] = frozenset(),
        delayed: bool = False,
    ):
        whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, dtype, masters=False, fixed=fixed)
        if next(iter(whole.values())).data_ptr() == next(iter(self.working.values())).data_ptr():
            whole = {name: tensor.clone() for name, tensor in whole.items()}  # the device's pool is the host's here
        self.streams = Streams(device)
        self.place(model)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = True
        self.pool = pool(training_bytes(whole.values()))
        self.parameters = {}
        for name in list(whole):
            tensor = whole.pop(name)
            master = self.pool.zeros(tensor.shape, tensor.dtype)
            self.parameters[name] = nn.Parameter(master.copy_(tensor))
        self._leaving = HostSums(self.streams, delayed=delayed)
        self.staged: dict[str, Tensor] = {}
        if self.streams.cuda:
            self.stage()
        for name, parameter in self.working.items():
            parameter.register_post_accumulate_grad_hook(partial(self._leave, name))

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, but for matrices that are read by tiles: these are pinned where a GPU reads them."""
        tiled = {id(weight) for weight in tiled_weights(self.model)}

        def placed(tensor: Tensor) -> Tensor:
            if id(tensor) not in tiled:
                return tensor.to(self.streams.device)
            return tensor.pin_memory() if self.streams.cuda and not tensor.is_pinned() else tensor

        module._apply(placed)  # as module.to does

    def keep_moments(self, optimizer: Optimizer) -> None:
        """Put Adam's moments into the pool."""
        keep_moments(optimizer, self.pool)

    def stage(self) -> None:
        """Round updated weights in host memory, pinned for a GPU, before they are copied to the device; but for matrices that are read
        by tiles, which are there already."""
        tiled = {id(weight) for weight in tiled_weights(self.model)}
        working = {name: p for name, p in self.working.items() if id(p) not in tiled}
        pool = HostPool(self.streams.cuda, sum(p.numel() * p.dtype.itemsize for p in working.values()))
        self.staged = {name: pool.zeros(p.shape, p.dtype).copy_(p.detach()) for name, p in working.items()}

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """What `gather` copies to the model, behind every master."""
        return {
            master: self.staged.get(name, self.working[name].detach())
            for name, master in self.parameters.items()
            if master is not self.working[name]
        }

    @torch.no_grad()
    def gather(self) -> None:
        """Copy what was rounded on the host to the device. The next update waits for gradients that are computed after it."""
        for name, staged in self.staged.items():
            self.working[name].copy_(staged, non_blocking=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters to the model, after they were set."""
        for master, copy in self.copies().items():
            copy.copy_(master)
        self.gather()

    def _leave(self, name: str, parameter: nn.Parameter) -> None:
        """Copy a complete gradient to the host and free it."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        self._leaving.leave(name, gradient)

    def accumulate(self) -> None:
        """Wait until the gradients that have left are in the step's sums."""
        self._leaving.wait()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the step has reached, on the host; those of a later step take their place."""
        sums = self._leaving.wait()
        return {name: sums[name] for name in self.working if name in sums}  # not as they have left

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._leaving.clear()

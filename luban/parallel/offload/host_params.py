"""fp32 weights outside of the device, whose gradients leave it layer by layer (Ren et al. 2021, ZeRO-Offload).

The device holds weights in the dtype of the matmuls, and the gradients of the layer whose backward pass runs. As soon as the gradient
of a parameter is complete, a hook copies it to the host, on a stream of its own on a GPU, and frees it. Adam runs on the host, in
torch's vectorised and threaded kernel; updated weights are copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from luban.optim.adamw import AdamWGroups
from luban.optim.base import Optimizer, ParamGroups
from luban.parallel.offload.pools import DiskPool, Pool
from luban.parallel.offload.streamed import StreamedGroups
from luban.parallel.offload.tiles import tiled_weights
from luban.parallel.precision import MixedPrecisionParams
from luban.parallel.remat.host import Streams


class HostParams(MixedPrecisionParams):
    """`MixedPrecisionParams` whose masters lie in a pool.

    Args:
        model: with initialised fp32 (or fp64) parameters on the CPU; afterwards its parameters are on the device.
        device: that computes.
        pool: bytes that it must hold → the pool of the masters and of the optimizer's moments.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        pool: Callable[[int], Pool],
        *,
        fixed: Collection[str] = frozenset(),
    ):
        whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, dtype, masters=False, fixed=fixed)
        if next(iter(whole.values())).data_ptr() == next(iter(self.working.values())).data_ptr():
            whole = {name: tensor.clone() for name, tensor in whole.items()}  # the device's pool is the host's here
        self.streams = Streams(device)
        self.place(model)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = True
        kinds = {tensor.dtype for tensor in whole.values()}
        size = sum(3 * DiskPool.bytes_of([t.shape for t in whole.values() if t.dtype == kind], kind) for kind in kinds)
        self.pool = pool(size)
        self.parameters = {}
        for name in list(whole):
            tensor = whole.pop(name)
            master = self.pool.zeros(tensor.shape, tensor.dtype)
            self.parameters[name] = nn.Parameter(master.copy_(tensor))
        self._left: list[tuple[str, Tensor, torch.cuda.Event | None]] = []
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
        """Put Adam's moments into the pool; those on a disk are streamed through memory from now on."""
        for algorithm in optimizer.algorithms:
            assert isinstance(algorithm, AdamWGroups)
            for parameter, state in algorithm.state.items():
                state.update(
                    exp_avg=self.pool.zeros(parameter.shape, parameter.dtype),
                    exp_avg_sq=self.pool.zeros(parameter.shape, parameter.dtype),
                    step=torch.zeros(()),
                )
        pool = self.pool
        if isinstance(pool, DiskPool) and pool.direct is not None:
            streamed: list[ParamGroups] = [StreamedGroups(algorithm, pool) for algorithm in optimizer.algorithms]
            optimizer.algorithms = streamed

    def _leave(self, name: str, parameter: nn.Parameter) -> None:
        """Copy a complete gradient to the host and free it."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if self.streams.cuda and not gradient.is_cuda:  # of a matrix that is read by tiles
            self._left.append((name, gradient, None))
            return
        with self.streams.copying("out"):
            host = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=self.streams.cuda)
            host.copy_(gradient, non_blocking=True)
            if self.streams.cuda:
                gradient.record_stream(torch.cuda.current_stream(self.streams.device))
            self._left.append((name, host, self.streams.event()))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients that have left to the step's sums, on the host."""
        for name, gradient, event in self._left:
            if event is not None:
                event.synchronize()
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient if gradient.dtype == torch.float64 else gradient.float()
        self._left.clear()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the step has reached, on the host."""
        self.accumulate()
        return {name: self._sums[name] for name in self.working if name in self._sums}  # not as they have left

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums, self._left = {}, []

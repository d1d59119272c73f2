"""fp32 weights outside of the device, whose gradients leave it layer by layer (Ren et al. 2021, ZeRO-Offload).

The device holds weights in the dtype of the matmuls, and the gradients of the layer whose backward pass runs. As soon as the gradient
of a parameter is complete, a hook copies it to the host, on a stream of its own on a GPU, and frees it; a thread adds it to the step's
fp32 sums while the backward pass goes on. Adam runs on the host, in torch's vectorised and threaded kernel, and rounds what it has
updated to the dtype of the matmuls there; that is copied back. All of this memory is taken once: new pages cost more than the sums.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from luban.core.plan import ParallelPlan
from luban.optim.base import Optimizer
from luban.parallel.offload.layer_weights import FromDisk, FromHost, LayerWeights
from luban.parallel.offload.pools import HostPool, Pool, places
from luban.parallel.offload.streamed import keep_moments
from luban.parallel.offload.sums import HostSums
from luban.parallel.offload.tiles import tiled_weights
from luban.parallel.precision import MixedPrecisionParams
from luban.parallel.remat.host import Streams


class HostParams(MixedPrecisionParams):
    """`MixedPrecisionParams` whose masters lie in a pool.

    Args:
        blocks: of the model, in the order in which they run.
        model: with initialised fp32 (or fp64) parameters on the CPU; afterwards its parameters are on the device.
        device: that computes.
        plan: says where masters, moments, sums of gradients and the layers' weights are.
    """

    layers: LayerWeights | None = None  # weights that come to the device with their layer; None: they stay there

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        plan: ParallelPlan,
        *,
        fixed: Collection[str] = frozenset(),
    ):
        whole = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model, dtype, masters=False, fixed=fixed)
        if next(iter(whole.values())).data_ptr() == next(iter(self.working.values())).data_ptr():
            whole = {name: tensor.clone() for name, tensor in whole.items()}  # the device's pool is the host's here
        self.streams, self.masters = Streams(device), True
        coming = {} if plan.offload_weights == "none" else _inside(model, blocks)
        moved = [self.working[name].detach() for name in coming]
        self.places = places(plan, device, list(whole.values()), moved)
        self.parameters = {}
        for name in list(whole):
            tensor = whole.pop(name)
            master = self.places.state.zeros(tensor.shape, tensor.dtype)
            self.parameters[name] = nn.Parameter(master.copy_(tensor))
        self._leaving = HostSums(self.streams, delayed=plan.offload_delay, pool=self.places.sums)
        # on the host, behind the device's: those of layers that come, and on a GPU all that must be copied after an update
        self.coming = self._on_host(coming, self.places.weights)
        self.place(model)
        self.working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if coming:
            self.layers = self._layers(coming, len(blocks), blocks)
        self.staged: dict[str, Tensor] = {}
        if self.streams.cuda:
            self.stage()
        for name, parameter in self.working.items():
            parameter.register_post_accumulate_grad_hook(partial(self._leave, name))

    def place(self, module: nn.Module) -> None:
        """Move a module to the device, but for matrices that are read by tiles: these are pinned where a GPU reads them. Weights that
        come with their layer get no memory there yet."""
        tiled = {id(weight) for weight in tiled_weights(self.model)}
        coming = {id(self.working[name]) for name in self.coming}

        def placed(tensor: Tensor) -> Tensor:
            if id(tensor) in coming:
                if tensor.device.type == self.streams.device.type and not self.streams.cuda:
                    return tensor
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.streams.device)
                empty.untyped_storage().resize_(0)
                return empty
            if id(tensor) not in tiled:
                return tensor.to(self.streams.device)
            return tensor.pin_memory() if self.streams.cuda and not tensor.is_pinned() else tensor

        module._apply(placed)  # as module.to does

    def keep_moments(self, optimizer: Optimizer) -> None:
        """Put Adam's moments into the pool."""
        keep_moments(optimizer, self.places.state)

    def _on_host(self, names: Iterable[str], pool: Pool | None) -> dict[str, Tensor]:
        """Rounded weights in a pool; None: in host memory, pinned for a GPU."""
        working = {name: self.working[name].detach() for name in names}
        if pool is None:
            pool = HostPool(self.streams.cuda, sum(p.numel() * p.itemsize for p in working.values()))
        return {name: pool.zeros(p.shape, p.dtype).copy_(p) for name, p in working.items()}

    def _layers(self, coming: Mapping[str, int], count: int, blocks: Sequence[nn.Module]) -> LayerWeights:
        names = [[name for name, layer in coming.items() if layer == index] for index in range(count)]
        host = [[self.coming[name] for name in each] for each in names]
        pool, source = self.places.weights, FromHost(host)
        if pool is not None and pool.direct is not None:
            source = FromDisk(host, pool, pool.direct)
        return LayerWeights(blocks, [[self.working[name] for name in each] for each in names], source, self.streams)

    def stage(self) -> None:
        """Round updated weights in host memory, pinned for a GPU, before they are copied to the device; but for those that are there
        already, to come with their layer or to be read by tiles."""
        tiled = {id(weight) for weight in tiled_weights(self.model)}
        here = [name for name, p in self.working.items() if id(p) not in tiled and name not in self.coming]
        self.staged = self._on_host(here, None)

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """What `gather` copies to the model, behind every master."""
        host = {**self.staged, **self.coming}
        return {
            master: host.get(name, self.working[name].detach())
            for name, master in self.parameters.items()
            if master is not self.working[name]
        }

    @torch.no_grad()
    def gather(self) -> None:
        """Copy what was rounded on the host to the device. The next update waits for gradients that are computed after it."""
        for name, staged in self.staged.items():
            self.working[name].copy_(staged, non_blocking=True)
        if self.layers is not None:
            self.layers.forget()

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


def _inside(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    """Trained parameters that are in one block alone → its index."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    users: dict[int, set[int]] = {}
    inside = {id(module): index for index, block in enumerate(blocks) for module in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(inside.get(id(module), -1))
    return {
        names[key]: index
        for key, found in users.items()
        if key in names and len(found) == 1
        for index in found
        if index >= 0
    }

"""Parameters that FSDP2 divides among processes, as the optimizer and checkpoints see them (ZeRO, Rajbhandari et al. 2020)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from luban.models.build import state_of
from luban.nn.init import cut
from luban.optim.base import Optimizer
from luban.parallel.shard import local_region


def shard_modules(
    root: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    *,
    zero: int,
    dtype: torch.dtype,
    apart: set[nn.Parameter] | None = None,
    offloads: bool = False,
) -> None:
    """Divide the parameters below `root`, every block's as one group and the rest as another.

    Args:
        mesh: of the axis shard, or of replicate and shard.
        zero: 3 divides weights, gradients and optimizer state, but keeps what lies outside the blocks whole from the forward to
            the backward pass, which begins with it; 2 keeps the blocks' weights whole as well; 1 keeps gradients whole as well,
            until the last micro-batch of a step.
        dtype: of the matmuls; weights are kept, and gradients summed, in fp32 (fp64 for fp64).
        apart: parameters that are left as they are.
        offloads: the shards, and the sums of their gradients, are in host memory, pinned for a GPU.
    """
    pinned = mesh.device_type == "cuda"
    away = CPUOffloadPolicy(pin_memory=pinned) if offloads else OffloadPolicy()
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    divide = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=away, ignored_params=apart)
    for block in blocks:
        divide(block, reshard_after_forward=zero == 3)
    divide(root, reshard_after_forward=False)
    for module in fsdp_modules(root):
        module.set_gradient_divide_factor(1.0)  # losses are divided by the targets of the whole step already
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    """Every module whose parameters FSDP keeps as one group."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


class ShardedParams:
    """This process's shards as plain tensors that share their memory; `MixedPrecisionParams` of a sharded model.

    Args:
        root: what `shard_modules` divided, its parameters initialised.
        model: the model in it.
        zero: as `shard_modules` was given it.
        fixed: names of parameters and buffers that a run's checkpoints leave out: a frozen base's.
        device: of buffers; None: where they are.
    """

    masters = False  # the shards are the fp32 weights; FSDP casts what it gathers
    messages: DeviceMesh | None = None  # over which shards on the host are made whole; None: that which they know

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        *,
        zero: int = 3,
        fixed: Collection[str] = frozenset(),
        device: torch.device | None = None,
    ):
        self.model, self.fixed = model, fixed
        if device is not None:
            _place_buffers(root, device)
        self._groups, self.zero = fsdp_modules(root), zero
        for group in self._groups:  # shards of uneven size are moved into padded memory when they are first gathered
            group.unshard()
            group.reshard()
        self.working: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.divided: dict[str, Tensor] = {**self.working}  # that know where this process's shards lie in the whole
        self.parameters = {n: nn.Parameter(_local(p.detach()), requires_grad=False) for n, p in self.working.items()}
        self._sums: dict[str, Tensor] = {}

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before the backward pass of a micro-batch. At ZeRO 1 gradients stay whole until the last of a step."""
        if self.zero == 1:
            for group in self._groups:
                group.set_requires_gradient_sync(last, recurse=False)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the gradients of a micro-batch off the model and add them up."""
        for name, parameter in self.working.items():
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                self._sums[name] = self._sums[name].add_(gradient) if name in self._sums else gradient
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that the step has reached."""
        self.accumulate()
        return self._sums

    def keep_moments(self, optimizer: Optimizer) -> None:
        """Where the optimizer's state is to be: beside the shards, where the optimizer makes it."""

    def begins(self) -> dict[str, int]:
        """The index along dimension 0 at which each shard begins."""
        return {name: local_region(parameter)[1][0] for name, parameter in self.divided.items() if parameter.dim()}

    def copies(self) -> dict[nn.Parameter, Tensor]:
        """None: FSDP casts what it gathers."""
        return {}

    def clear(self) -> None:
        """Forget the step's gradients."""
        self._sums = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, but for what is `fixed`; this process holds shards, and `whole` makes each
        whole.

        The shards, not what the model has at the moment: after a forward pass without a backward one (validation) FSDP leaves
        gathered weights there, in the dtype of the matmuls.
        """
        state = {**state_of(self.model), **{name: parameter.detach() for name, parameter in self.divided.items()}}
        return {name: tensor for name, tensor in state.items() if name not in self.fixed}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up this process's shards of whole tensors."""
        for name, tensor in self.state_dict().items():
            local, begins = local_region(tensor)
            local.copy_(cut(tensors[name], local, begins))

    def like(self, name: str) -> Tensor:
        """The parameter that knows where this process's shard lies in the whole."""
        return self.divided[name].detach()

    def gather(self) -> None:
        """After the weights have changed: FSDP gathers them where they are used."""

    def refresh(self) -> None:
        """After the weights were set: FSDP casts what it gathers."""

    def whole(self, name: str, local: Tensor) -> Tensor:
        """A tensor of the model's or the optimizer's state, whole. Every process must call it."""
        if isinstance(local, DTensor) or name not in self.divided:
            return _whole(local, self.messages)
        like = self.divided[name]
        if not isinstance(like, DTensor) or local.shape != like.to_local().shape or not local.dim():
            return local.detach()
        return _whole(_like(like, local, self.messages or like.device_mesh), self.messages)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor of the optimizer's state, as a new tensor."""
        like = self.divided[name].detach()
        if whole.shape != like.shape or not whole.dim():
            return whole
        local, begins = local_region(like)
        return cut(whole, local, begins).clone()


def _place_buffers(root: nn.Module, device: torch.device) -> None:
    """Move buffers, which FSDP leaves where they are; what is shared stays shared."""
    placed: dict[int, Tensor] = {}
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = placed.setdefault(id(buffer), buffer.to(device))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(like: DTensor, local: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor divided as another is, this process's part of which goes to where the mesh sends messages from."""
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _whole(tensor: Tensor, messages: DeviceMesh | None) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local, mesh = tensor.to_local(), messages or tensor.device_mesh
    if local.device.type != mesh.device_type:
        tensor = _like(tensor, local, mesh)
    return tensor.full_tensor().detach()

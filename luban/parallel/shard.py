"""Where the shards of a parameter lie, and the messages about them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def local_region(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This process's shard of a tensor (a view), and the index in the full tensor at which it begins."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor import DTensor  # slow to import
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, begins = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), begins


def message_device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must be that a group sends."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

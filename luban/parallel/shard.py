"""Where the shards of a parameter lie."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_region(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This process's shard of a tensor (a view), and the index in the full tensor at which it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, begins = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), begins

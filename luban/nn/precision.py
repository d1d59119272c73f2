"""The precision in which sums of many terms are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x itself where it is float32 or float64, otherwise in float32; any shape."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

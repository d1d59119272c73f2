"""SwiGLU by its definition (Shazeer 2020, equation 6). N rows, I inner width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, 2I), gates first → (N, I): silu(gate) · up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_of_pairs(gate_up: Tensor) -> Tensor:
    """(N, 2I), every gate with its up behind it → (N, I)."""
    return F.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]

"""Arguments of an optimizer kernel for one tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stepped(NamedTuple):
    """A weight and the tensors that its update reads and writes; contiguous, all but `steps` of one shape."""

    weight: Tensor  # fp32 or bf16
    gradient: Tensor  # fp32, bf16 or fp16
    first: Tensor  # first moment; both moments are fp32 or both bf16
    second: Tensor  # second moment
    steps: Tensor  # () fp32 on the device: number of updates, this one included
    seed: int  # of stochastic rounding, different for each tensor; combined with `steps`, so each step has new noise
    copy: Tensor | None = None  # half-precision copy of an fp32 weight

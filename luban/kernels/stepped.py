"""What an optimizer's kernel steps, one tensor at a time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Stepped(NamedTuple):
    """A tensor with all that its update reads and writes; contiguous, all but `steps` of one size."""

    weight: Tensor  # fp32 or bf16
    gradient: Tensor  # fp32, bf16 or fp16
    first: Tensor  # moments, both fp32 or both bf16
    second: Tensor
    steps: Tensor  # scalar fp32 on the device: how many updates there were, this one included
    seed: int  # of the rounding, different for every tensor; with `steps` it draws different noise every step
    copy: Tensor | None = None  # in half precision, of an fp32 weight

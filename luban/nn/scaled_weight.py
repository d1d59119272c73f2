"""Linear maps with weights in 8 bits for inference on a GPU: int8 or fp8 (e4m3), with one scale an output.

Inputs stay in their precision, so that all rows are multiplied by the same rounded weights, however many there are.
I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.kernels.available import triton_runs

if TYPE_CHECKING:
    from luban.nn.roles import Role


class ScaledWeight(nn.Module):
    """x·numbersᵀ·scale (+ bias); scale = max|w| of an output's weights over the largest number."""

    dtype: ClassVar[torch.dtype]
    largest: ClassVar[float]

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        super().__init__()
        wide = weight_OI.detach().float()
        scale_O = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / self.largest
        rounded = self._rounded(wide / scale_O[:, None]).contiguous()
        # as whole numbers, so that nothing takes fp8 for the model's precision
        self.bits = nn.Parameter(rounded.view(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale_O, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self.parameter_roles: dict[str, Role] = {"bits": "dense", "scale": "bias", "bias": "bias"}

    def _rounded(self, scaled_OI: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def numbers(self) -> Tensor:
        """(O, I) in 8 bits."""
        return self.bits.view(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in the precision of the input."""
        numbers = self.numbers
        outputs = numbers.shape[0]
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 0:
            return x.new_empty(*x.shape[:-1], outputs)
        if triton_runs(x):
            from luban.kernels.gemv import ROWS, gemv
            from luban.kernels.scaled_matmul import MOST_ROWS, scaled_matmul

            if len(rows) in ROWS:
                return gemv(x, numbers, self.bias, self.scale)
            if len(rows) <= MOST_ROWS:
                return scaled_matmul(rows, numbers, self.scale, self.bias).view(*x.shape[:-1], outputs)
        weight = (numbers.float() * self.scale[:, None]).to(x.dtype)
        return F.linear(x, weight, self.bias)


class Int8Scaled(ScaledWeight):
    """Whole numbers up to 127."""

    dtype, largest = torch.int8, 127.0

    def _rounded(self, scaled_OI: Tensor) -> Tensor:
        return scaled_OI.round().to(self.dtype)


class Float8Scaled(ScaledWeight):
    """e4m3: three bits of a mantissa, so that small weights keep their precision."""

    dtype, largest = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max

    def _rounded(self, scaled_OI: Tensor) -> Tensor:
        return scaled_OI.to(self.dtype)

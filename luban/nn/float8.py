"""Matmuls in 8-bit floating point with one scale a row (Micikevicius et al. 2022, "FP8 formats for deep learning").

N rows, I inputs, O outputs. Values and gradients are e4m3: every row of a factor is scaled so that its largest value is
the format's largest, which gives gradients the range for which e5m2 is taken elsewhere, and they keep a bit more. Matmuls are
summed along a row, so that the scales stay outside the sum. The gradient of the weights, a sum over all tokens,
is kept in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luban.core.errors import UnsupportedError
from luban.core.log import warn
from luban.kernels.limits import FLOAT8_SIDES, fits_float8, fits_float8_swiglu
from luban.nn.linear import Matmul, matmul_owners

E4M3 = torch.float8_e4m3fn


def require_float8(device: torch.device, instead: str = "use --train.precision bf16") -> None:
    """Raise UnsupportedError where the hardware has no 8-bit floating point; `instead`: what would be right."""
    if device.type != "cuda":
        raise UnsupportedError(f"fp8 needs a CUDA GPU of compute capability 8.9 or higher, this is {device}: {instead}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UnsupportedError(
            f"fp8 needs a GPU of compute capability 8.9 or higher; {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}: {instead}"
        )


class Float8Matmul(Matmul):
    """fp8 matmuls of weight owners."""

    def supports(self, outputs: int, inputs: int) -> bool:
        """True if both dimensions are multiples of 16."""
        return fits_float8(outputs, inputs)

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x·weightᵀ (+ bias), (…, I) → (…, O), with both factors rounded to fp8."""
        y = _product(x.reshape(-1, x.shape[-1]), weight_OI).view(*x.shape[:-1], -1)
        return y if bias_O is None else y + bias_O

    def supports_swiglu(self, width: int, inner: int) -> bool:
        """True if one kernel program can hold a row."""
        return fits_float8_swiglu(width, inner)

    def swiglu(self, x_NE: Tensor, gate_up_WE: Tensor, down_OI: Tensor) -> Tensor:
        """(silu(gate)·up)·downᵀ, (N, O). What the kernels between the matmuls write is rounded at once."""
        return _gated(x_NE, gate_up_WE, down_OI)


FLOAT8 = Float8Matmul()


def use_float8(module: nn.Module) -> int:
    """Let the matmul owners inside `module` multiply in 8 bits, in place; returns how many do.

    Those with a side that is no multiple of 16 stay as they are, and one warning names the first.
    """
    for product in (_product, _gated):
        # torch 2.11's compiler, where it looks into these two, makes their gradients zeros and keeps what recomputation was to
        # compute again; here and not where they are defined, since it is slow to import
        torch.compiler.allow_in_graph(product)
    owners = dict(matmul_owners(module))
    refused = {name: owner for name, owner in owners.items() if owner.use_matmul(FLOAT8)}
    if refused:
        name, owner = next(iter(refused.items()))
        odd = next(p for p in owner.projections().values() if not fits_float8(p.out_features, p.in_features))
        warn(
            f"{len(refused)} layers stay in bf16, since fp8 matmuls need sides that are multiples of {FLOAT8_SIDES}: "
            f"{name} is {(odd.out_features, odd.in_features)}"
        )
    return len(owners) - len(refused)


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return scaled_product(*by_rows(x_NI), *by_rows(weight_OI), x_NI.dtype)

    @staticmethod
    def backward(ctx, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        dx_NI = None
        if of_x:
            dx_NI = scaled_product(*by_rows(dy_NO), *by_rows(weight_OI.t()), dy_NO.dtype)
        return dx_NI, dy_NO.t() @ x_NI if of_weight else None


class _Float8Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE: Tensor, weight_WE: Tensor, down_OI: Tensor) -> Tensor:
        from luban.kernels.swiglu_rows import swiglu_rows

        gate_up = scaled_product(*by_rows(x_NE), *by_rows(weight_WE), x_NE.dtype)
        ctx.save_for_backward(x_NE, weight_WE, down_OI, gate_up)
        inner, scales = swiglu_rows(gate_up, E4M3)
        return scaled_product(inner, scales, *by_rows(down_OI), x_NE.dtype)

    @staticmethod
    def backward(ctx, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        from luban.kernels.swiglu_rows import swiglu_rows_backward

        x_NE, weight_WE, down_OI, gate_up = ctx.saved_tensors
        of_x, of_weight, of_down = ctx.needs_input_grad
        d_inner = scaled_product(*by_rows(dy_NO), *by_rows(down_OI.t()), dy_NO.dtype)
        d_gate_up, rounded, scales, inner = swiglu_rows_backward(gate_up, d_inner, E4M3)
        dx_NE = scaled_product(rounded, scales, *by_rows(weight_WE.t()), dy_NO.dtype) if of_x else None
        return dx_NE, d_gate_up.t() @ x_NE if of_weight else None, dy_NO.t() @ inner if of_down else None


def _product(*factors: Tensor) -> Tensor:
    return _Float8Product.apply(*factors)


def _gated(*factors: Tensor) -> Tensor:
    return _Float8Gated.apply(*factors)


def by_rows(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, (R, 1) fp32 scales) whose product is x, rounded."""
    wide = x_RC.float()
    scale_R1 = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / torch.finfo(E4M3).max
    return (wide / scale_R1).to(E4M3).contiguous(), scale_R1


def scaled_product(a_NC: Tensor, a_scale: Tensor, b_MC: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """a·bᵀ of 8-bit rows with their scales, (N, M); off CUDA by its definition, for tests."""
    if a_NC.is_cuda:
        return torch._scaled_mm(
            a_NC, b_MC.t(), scale_a=a_scale, scale_b=b_scale.t(), out_dtype=dtype, use_fast_accum=True
        )
    return ((a_NC.float() * a_scale) @ (b_MC.float() * b_scale).t()).to(dtype)

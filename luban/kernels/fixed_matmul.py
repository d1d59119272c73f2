"""x·wᵀ in Triton with one fixed tile and one order of summation, whatever the number of rows.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.kernels.available import INTERPRETED
from luban.kernels.flash.tile import matmul

TILE_ROWS = 64
TILE_OUTPUTS = 64
TILE_INPUTS = 64


@triton.jit
def fixed_matmul_kernel(
    X,
    W,
    BIAS,
    OUT,
    N,
    outputs_count,
    x_row,
    x_in,
    w_out,
    w_in,
    INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the result. Grid (row tiles, output tiles)."""
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    outputs = (tl.program_id(1) * BO + tl.arange(0, BO)).to(tl.int64)
    inputs = tl.arange(0, BI)
    total = tl.zeros([BN, BO], tl.float32)
    for start in range(0, INPUTS, BI):
        at = start + inputs
        x = tl.load(
            X + rows[:, None] * x_row + at[None, :] * x_in, mask=(rows[:, None] < N) & (at[None, :] < INPUTS), other=0.0
        )
        w = tl.load(
            W + outputs[None, :] * w_out + at[:, None] * w_in,
            mask=(outputs[None, :] < outputs_count) & (at[:, None] < INPUTS),
            other=0.0,
        )
        total += matmul(x, w, UPCAST)
    if HAS_BIAS:
        total += tl.load(BIAS + outputs, mask=outputs < outputs_count, other=0.0).to(tl.float32)[None, :]
    there = (rows[:, None] < N) & (outputs[None, :] < outputs_count)
    tl.store(OUT + rows[:, None] * outputs_count + outputs[None, :], total.to(OUT.dtype.element_ty), mask=there)


def fixed_matmul(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(N, I), (O, I), (O,) → (N, O) in the weight's dtype."""
    (N, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    x_NI = x_NI.to(weight_OI.dtype)
    out = torch.empty(N, outputs, dtype=weight_OI.dtype, device=x_NI.device)
    fixed_matmul_kernel[(triton.cdiv(N, TILE_ROWS), triton.cdiv(outputs, TILE_OUTPUTS))](
        x_NI,
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        out,
        N,
        outputs,
        x_NI.stride(0),
        x_NI.stride(1),
        weight_OI.stride(0),
        weight_OI.stride(1),
        INPUTS=inputs,
        HAS_BIAS=bias_O is not None,
        BN=TILE_ROWS,
        BO=TILE_OUTPUTS,
        BI=TILE_INPUTS,
        UPCAST=INTERPRETED,
        num_warps=4,  # type: ignore[call-arg]
        num_stages=3,  # type: ignore[call-arg]
    )
    return out

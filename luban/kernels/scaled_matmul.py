"""Rows times a matrix whose weights are kept in 8 bits with a scale for every output, which are widened on the way into the tensor
cores: decoding some sequences at once costs what reading the weights costs, of which there are half as many bytes.

N rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.kernels.available import INTERPRETED
from luban.kernels.flash.tile import matmul

MOST_ROWS = 256  # beyond, weights that are widened once and multiplied by cuBLAS cost less
TILES = ((16, 32), (32, 32), (64, 64))  # rows, outputs; the first that holds all rows, else the last
TILE_INPUTS = 128


@triton.jit(do_not_specialize=["N"])
def scaled_matmul_kernel(
    X,
    W,
    SCALE,
    BIAS,
    OUT,
    N,
    outputs_count,
    x_row,
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
    inputs, inside = tl.arange(0, BI), outputs < outputs_count
    total = tl.zeros([BN, BO], tl.float32)
    for start in range(0, INPUTS, BI):
        at = start + inputs
        x = tl.load(
            X + rows[:, None] * x_row + at[None, :], mask=(rows[:, None] < N) & (at[None, :] < INPUTS), other=0.0
        )
        w = tl.load(
            W + outputs[:, None] * INPUTS + at[None, :], mask=inside[:, None] & (at[None, :] < INPUTS), other=0.0
        )
        total += matmul(x, tl.trans(w.to(x.dtype)), UPCAST)
    total *= tl.load(SCALE + outputs, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(BIAS + outputs, mask=inside, other=0.0).to(tl.float32)[None, :]
    there = (rows[:, None] < N) & inside[None, :]
    tl.store(OUT + rows[:, None] * outputs_count + outputs[None, :], total.to(OUT.dtype.element_ty), mask=there)


def scaled_matmul(x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x·weightᵀ·scale (+ bias), (N, O) in the dtype of x; no gradients.

    Args:
        weight_OI: int8 or float8_e4m3fn, contiguous. scale_O: float32.
    """
    (N, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    out = torch.empty(N, outputs, dtype=x_NI.dtype, device=x_NI.device)
    tile_rows, tile_outputs = next((tile for tile in TILES if tile[0] >= N), TILES[-1])
    scaled_matmul_kernel[(triton.cdiv(N, tile_rows), triton.cdiv(outputs, tile_outputs))](
        x_NI,
        weight_OI,
        scale_O,
        scale_O if bias_O is None else bias_O,
        out,
        N,
        outputs,
        x_NI.stride(0),
        INPUTS=inputs,
        HAS_BIAS=bias_O is not None,
        BN=tile_rows,
        BO=tile_outputs,
        BI=TILE_INPUTS,
        UPCAST=INTERPRETED,
        num_warps=4,  # type: ignore[call-arg]
        num_stages=4,  # type: ignore[call-arg]
    )
    return out

"""A few rows times a matrix, for inference: what decoding some tokens consists of. Such a product is as fast as the weights
are read. On an H200, a row in bf16 with matrices of 8 to 23 MB takes 0.65 to 0.8 of cuBLAS's time, with larger ones 0.9 to
0.95.

M rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 1, 2, 4  # that it serves, each a kernel of its own
BLOCK_O, BLOCK_I = 2, 1024  # of a program, which reads that much of the weights at a time
MANY_OUTPUTS = 8192  # from which on one warp a program is enough to keep the device busy


@triton.jit
def gemv_kernel(
    X,
    WEIGHT,
    SCALE,
    BIAS,
    OUT,
    outputs,
    inputs,
    x_row,
    weight_row,
    M: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """BLOCK_O outputs of all M rows; sums in float32."""
    at_o, at_i = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    inside_o = at_o < outputs
    rows = WEIGHT + at_o.to(tl.int64)[:, None] * weight_row
    for m in tl.static_range(M):  # type: ignore[not-iterable]
        sums = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for start in range(0, inputs, BLOCK_I):
            inside_i = start + at_i < inputs
            # after the first row the weights come from the cache
            w = tl.load(rows + start + at_i[None, :], mask=inside_o[:, None] & inside_i[None, :], other=0.0)
            x = tl.load(X + m * x_row + start + at_i, mask=inside_i, other=0.0)
            sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
        total = tl.sum(sums, 1)
        if HAS_SCALE:
            total *= tl.load(SCALE + at_o, mask=inside_o, other=0.0)
        if HAS_BIAS:
            total += tl.load(BIAS + at_o, mask=inside_o, other=0.0).to(tl.float32)
        tl.store(OUT + m * outputs + at_o, total.to(OUT.dtype.element_ty), mask=inside_o)


def gemv(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, scale_O: Tensor | None = None) -> Tensor:
    """x·weightᵀ (+ bias), (…, I) of as many rows as `ROWS` names → (…, O), without gradients.

    Args:
        weight_OI: its inputs lie one after another in memory.
        scale_O: float32; each output is multiplied by its own before the bias is added.
    """
    outputs, inputs = weight_OI.shape
    rows = x.reshape(-1, inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(outputs, BLOCK_O),)](
        rows,
        weight_OI,
        weight_OI if scale_O is None else scale_O,
        weight_OI if bias_O is None else bias_O,
        out,
        outputs,
        inputs,
        rows.stride(0),
        weight_OI.stride(0),
        M=len(rows),
        HAS_SCALE=scale_O is not None,
        HAS_BIAS=bias_O is not None,
        BLOCK_O=BLOCK_O,
        BLOCK_I=min(BLOCK_I, triton.next_power_of_2(inputs)),
        num_warps=1 if outputs >= MANY_OUTPUTS else 4,  # type: ignore[call-arg]
    )
    return out


def serves(x: Tensor, weight_OI: Tensor) -> bool:
    """Whether x and the weight are such as `gemv` takes."""
    rows = x.numel() // weight_OI.shape[1]
    return rows in ROWS and x.dtype == weight_OI.dtype and weight_OI.stride(1) == 1

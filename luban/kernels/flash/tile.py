"""What forward and backward share: how a tile of scores is biased and masked.

Scores live in base 2: s₂ = q·kᵀ·scale·log₂e + bias·log₂e, so that exp2 can be used throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALIBI, TABLE = 0, 1, 2  # bias kinds, compile-time


@triton.jit
def row_bounds(START, STOP, b, stride, rows, T, S, INTERVALS: tl.constexpr):
    """What each query row sees; rows past T repeat the last one, so that they widen nothing."""
    inside = tl.minimum(rows, T - 1)
    if INTERVALS:
        start = tl.load(START + b * stride + inside)
        stop = tl.load(STOP + b * stride + inside)
    else:
        start = inside * 0
        stop = inside + (S - T + 1)
    return start, stop


@triton.jit
def add_bias(s, rows, cols, TABLE_PTR, slope, T, S, zero, BIAS: tl.constexpr, EXACT: tl.constexpr):
    """s₂ plus the bias in base 2. `rows` and `cols` broadcast to the tile; queries are the last T of S places.

    ALiBi over a tile that lies wholly below the diagonal is linear in the column: −m(i − j) = m·j − m·i.
    """
    if BIAS == 1:
        delta = rows + (S - T) - cols
        if EXACT:
            delta = tl.abs(delta)
        s = s - slope * delta.to(tl.float32)
    if BIAS == 2:
        delta = rows + (S - T) - cols + zero
        delta = tl.minimum(tl.maximum(delta, 0), zero * 2)
        s = s + tl.load(TABLE_PTR + delta)
    return s


@triton.jit
def matmul(a, b, UPCAST: tl.constexpr):
    """a·b in float32; operands are widened under the interpreter, whose bf16 product is wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")

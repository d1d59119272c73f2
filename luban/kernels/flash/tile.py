"""What forward and backward share: how a tile of scores is biased and masked.

Scores live in base 2: s₂ = q·kᵀ·scale·log₂e + bias·log₂e, so that exp2 can be used throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALIBI, TABLE, POWER, LOG = 0, 1, 2, 3, 4  # bias kinds, compile-time


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
def load_parameters(PARAMETERS, h, BIAS: tl.constexpr):
    """The two numbers of a head's bias, scaled by the host so that the bias comes out in base 2."""
    first, second = 0.0, 0.0
    if BIAS == 1 or BIAS > 2:
        first = tl.load(PARAMETERS + h * 2)
        second = tl.load(PARAMETERS + h * 2 + 1)
    return first, second


@triton.jit
def distance(rows, cols, T, S, EXACT: tl.constexpr):
    """i − j as float32, its size where EXACT. Queries are the last T of S places."""
    delta = rows + (S - T) - cols
    if EXACT:
        delta = tl.abs(delta)
    return delta.to(tl.float32)


@triton.jit
def add_bias(s, rows, cols, TABLE_PTR, first, second, T, S, zero, BIAS: tl.constexpr, EXACT: tl.constexpr):
    """s₂ plus the bias in base 2. `rows` and `cols` broadcast to the tile.

    EXACT is false where a tile lies wholly below the diagonal, so that i − j ≥ 1.
    """
    if BIAS == 1:
        s = s - first * distance(rows, cols, T, S, EXACT)
    if BIAS == 2:
        delta = rows + (S - T) - cols + zero
        delta = tl.minimum(tl.maximum(delta, 0), zero * 2)
        s = s + tl.load(TABLE_PTR + delta)
    if BIAS == 3:
        away = distance(rows, cols, T, S, EXACT)
        s = s - first * tl.exp2(second * tl.log2(away))  # log2(0) = −∞, and exp2(−∞) = 0
    if BIAS == 4:
        s = s - first * tl.log2(1.0 + second * distance(rows, cols, T, S, EXACT))
    return s


@triton.jit
def moments(ds, rows, cols, first, second, T, S, BIAS: tl.constexpr, EXACT: tl.constexpr):
    """Row sums of ds × the derivatives of a KERPLE bias by its two numbers, up to factors that the host applies."""
    away = distance(rows, cols, T, S, EXACT)
    if BIAS == 3:
        if EXACT:
            log = tl.log2(tl.maximum(away, 1.0))
            power = tl.where(away == 0.0, 0.0, tl.exp2(second * log))
        else:
            log = tl.log2(away)
            power = tl.exp2(second * log)
        weighted = ds * power
        return tl.sum(weighted, 1), tl.sum(weighted * log, 1)
    inner = 1.0 + second * away
    return tl.sum(ds * tl.log2(inner), 1), tl.sum(ds * (away / inner), 1)


@triton.jit
def matmul(a, b, UPCAST: tl.constexpr):
    """a·b in float32; operands are widened under the interpreter, whose bf16 product is wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")

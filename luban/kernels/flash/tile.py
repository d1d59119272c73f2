"""Code shared by forward and backward: which tiles a program processes and how it loads them, bias and mask of scores, softmax.

Scores live in base 2: s₂ = q·kᵀ·scale·log₂e + bias·log₂e, so that exp2 can be used throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, ALIBI, TABLE, POWER, LOG = 0, 1, 2, 3, 4  # bias kinds, compile-time
MASKED, NEAR, FAR, SOMETIMES = 0, 1, 2, 3  # what a walk over tiles knows of them: all need the mask; none does; none
# does and all distances are far, where a bias is cheap; a mask where the tile isn't seen whole


@triton.jit
def row_bounds(START, STOP, b, stride, rows, T, S, INTERVALS: tl.constexpr):
    """Interval of visible keys of each query row; rows past T repeat the last one, so that they don't add keys."""
    inside = tl.minimum(rows, T - 1)
    if INTERVALS:
        start = tl.load(START + b * stride + inside)
        stop = tl.load(STOP + b * stride + inside)
    else:
        start = inside * 0
        stop = inside + (S - T + 1)
    return start, stop


@triton.jit
def own_block(ITEMS, blocks, HEADS: tl.constexpr, EACH: tl.constexpr, LAST_FIRST: tl.constexpr, ORDERED: tl.constexpr):
    """Batch row, head and block of this program, and its item if it has one (`work_items`). Programs start in the order
    of their numbers, and the longest should be first, over as many heads as near memory holds: the last heads' long ones
    would else be waited for at the end.

    Grid (blocks · EACH, B · HEADS / EACH): EACH heads stand side by side. ORDERED: grid (items · HEADS, rows that share
    the items).
    """
    block = tl.program_id(0) // EACH
    if ORDERED:
        ITEM = ITEMS + block * 6
        return tl.load(ITEM) + tl.program_id(1), tl.program_id(0) % EACH, tl.load(ITEM + 1), ITEM
    which = tl.program_id(1) * EACH + tl.program_id(0) % EACH
    if LAST_FIRST:
        block = blocks - 1 - block
    return which // HEADS, which % HEADS, block, ITEMS


@triton.jit
def load_tile(X, b, h, place, ROWS: tl.constexpr, D: tl.constexpr):
    """(ROWS, D) of one head from a place on, zeros past the end. X: a pointer to (B, heads, length, width), three strides,
    length and width."""
    at, inside = _pointers(X, b, h, place, ROWS, D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def fetch_tile(X, b, h, place, ROWS: tl.constexpr, D: tl.constexpr, FETCH: tl.constexpr):
    """`load_tile` in a walk. FETCH: X describes the tensor to the hardware that copies tiles by itself, which leaves no
    addresses to the threads; for a tile alone it would be waited for at once, so that nothing else is on its way."""
    if FETCH:
        x = X.load([b, h, place, 0]).reshape(ROWS, D)
    else:
        x = load_tile(X, b, h, place, ROWS, D)
    return x


@triton.jit
def store_tile(X, b, h, place, x, ROWS: tl.constexpr, D: tl.constexpr):
    """Write (ROWS, D) where `load_tile` would read it, in the dtype that stands there; nothing past the end."""
    at, inside = _pointers(X, b, h, place, ROWS, D)
    tl.store(at, x.to(X[0].dtype.element_ty), mask=inside)


@triton.jit
def _pointers(X, b, h, place, ROWS: tl.constexpr, D: tl.constexpr):
    """(ROWS, D) pointers, and whether they lie inside."""
    first, by_row, by_head, by_place, length, width = X
    corner = first + b.to(tl.int64) * by_row + h.to(tl.int64) * by_head + place.to(tl.int64) * by_place
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, D)[None, :]
    return corner + rows * by_place + dims, (place + rows < length) & (dims < width)


@triton.jit
def key_blocks(
    START,
    STOP,
    ITEM,
    b,
    stride,
    row0,
    T,
    S,
    BM: tl.constexpr,
    BN: tl.constexpr,
    INTERVALS: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """The blocks of keys that a tile of queries touches, [first, last), and those that all its rows see whole,
    [full_first, full_last). Bounds never decrease from row to row, so the tile's first and last row tell."""
    top, bottom = tl.minimum(row0, T - 1), tl.minimum(row0 + BM, T) - 1
    if ORDERED:
        first, last = tl.load(ITEM + 2) // BN, tl.cdiv(tl.load(ITEM + 5), BN)
        full_first, full_last = tl.cdiv(tl.load(ITEM + 3), BN), tl.load(ITEM + 4) // BN
    elif INTERVALS:
        START += b * stride
        STOP += b * stride
        first, last = tl.load(START + top) // BN, tl.cdiv(tl.load(STOP + bottom), BN)
        full_first, full_last = tl.cdiv(tl.load(START + bottom), BN), tl.load(STOP + top) // BN
    else:
        first, last = 0, tl.cdiv(bottom + (S - T + 1), BN)
        full_first, full_last = 0, (top + (S - T + 1)) // BN
    full_first = tl.minimum(full_first, last)
    return first, last, full_first, tl.maximum(full_last, full_first)


@triton.jit
def column_bounds(SEEING, cols, T, S, INTERVALS: tl.constexpr):
    """Which queries see each key: the first, and one past the last. Columns past S repeat the last one."""
    inside = tl.minimum(cols, S - 1)
    if INTERVALS:
        first = tl.load(SEEING + inside)
        past = tl.load(SEEING + S + inside)
    else:
        first = tl.maximum(inside - (S - T), 0)
        past = inside * 0 + T
    return first, past


@triton.jit
def query_blocks(
    SEEING, ITEM, col0, T, S, BM: tl.constexpr, BN: tl.constexpr, INTERVALS: tl.constexpr, ORDERED: tl.constexpr
):
    """`key_blocks` with queries and keys changed: the blocks of queries that see a tile of keys, [first, last), and those
    that see all of it, [full_first, full_last)."""
    left, right = col0, tl.minimum(col0 + BN, S) - 1
    if ORDERED:
        first, last = tl.load(ITEM + 2) // BM, tl.cdiv(tl.load(ITEM + 5), BM)
        full_first, full_last = tl.cdiv(tl.load(ITEM + 3), BM), tl.load(ITEM + 4) // BM
    elif INTERVALS:
        first, last = tl.load(SEEING + left) // BM, tl.cdiv(tl.load(SEEING + S + right), BM)
        full_first, full_last = tl.cdiv(tl.load(SEEING + right), BM), tl.load(SEEING + S + left) // BM
    else:
        first, last = tl.maximum(left - (S - T), 0) // BM, tl.cdiv(T, BM)
        full_first, full_last = tl.cdiv(tl.maximum(right - (S - T), 0), BM), T // BM
    full_first = tl.minimum(full_first, last)
    return first, last, full_first, tl.maximum(full_last, full_first)


@triton.jit
def load_parameters(PARAMETERS, TABLE_PTR, h, zero, reach, BIAS: tl.constexpr):
    """The two numbers of a head's bias, scaled by the host so that the bias comes out in base 2; of a table what it
    holds at the distance `reach`, from which on all are alike."""
    first, second = 0.0, 0.0
    if BIAS == 1 or BIAS > 2:
        first = tl.load(PARAMETERS + h * 2)
        second = tl.load(PARAMETERS + h * 2 + 1)
    if BIAS == 2:
        first = tl.load(TABLE_PTR + tl.minimum(zero + reach, zero * 2))
    return first, second


@triton.jit
def far_from(reach, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr):
    """The distance from which on all of a tile may be taken as far."""
    far = (BM + BN) * 3 // 2  # then the tile's centre is at least 4 times as far away as its corners are from it
    if BIAS == 2:
        far = reach
    return far


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
def derivatives(rows, cols, first, second, T, S, BIAS: tl.constexpr, EXACT: tl.constexpr):
    """The derivatives of a KERPLE bias by its two numbers, up to factors that the host applies."""
    away = distance(rows, cols, T, S, EXACT)
    if BIAS == 3:
        if EXACT:
            log = tl.log2(tl.maximum(away, 1.0))
            power = tl.where(away == 0.0, 0.0, tl.exp2(second * log))
        else:
            log = tl.log2(away)
            power = tl.exp2(second * log)
        return power, power * log
    inner = 1.0 + second * away
    return tl.log2(inner), away / inner


@triton.jit
def economise(c0, c1, c2, c3, c4, c5, reach):
    """The cubic nearest to a polynomial of degree 5 on [−reach, reach]: its last two powers are replaced by their
    Chebyshev approximations of lower degree (x⁴ ≈ r²x² − r⁴/8, x⁵ ≈ 5/4·r²x³ − 5/16·r⁴x)."""
    square = reach * reach
    c0 -= c4 * square * square * 0.125
    c1 -= c5 * square * square * 0.3125
    return c0, c1, c2 + c4 * square, c3 + c5 * square * 1.25


@triton.jit
def power_series(second, centre):
    """Taylor coefficients of Δ^second at `centre`, degree 5."""
    inverse = 1.0 / centre
    c0 = tl.exp2(second * tl.log2(centre))
    c1 = c0 * second * inverse
    c2 = c1 * (second - 1.0) * inverse * 0.5
    c3 = c2 * (second - 2.0) * inverse * 0.3333333333
    c4 = c3 * (second - 3.0) * inverse * 0.25
    c5 = c4 * (second - 4.0) * inverse * 0.2
    return c0, c1, c2, c3, c4, c5


@triton.jit
def log_series(second, centre):
    """Taylor coefficients of log₂(1 + second·Δ) at `centre`, degree 5."""
    inner = 1.0 + second * centre
    ratio = second / inner
    c1 = 1.4426950408889634 * ratio
    c2 = -c1 * ratio * 0.5
    c3 = -c2 * ratio * 0.6666666667
    c4 = -c3 * ratio * 0.75
    c5 = -c4 * ratio * 0.8
    return tl.log2(inner), c1, c2, c3, c4, c5


@triton.jit
def far_bias(first, second, centre, reach, BIAS: tl.constexpr):
    """The cubic in x = Δ − centre that stands for first·Δ^second or first·log₂(1 + second·Δ), |x| ≤ reach.

    With centre ≥ 4·reach its relative error stays below 10⁻⁴ for every exponent up to 2 (the first terms left out
    are at most 0.042/8·(reach/centre)⁴ and 0.03/16·(reach/centre)⁵ of it), and four multiply-adds replace two
    transcendental functions for every score.
    """
    if BIAS == 3:
        c0, c1, c2, c3, c4, c5 = power_series(second, centre)
    else:
        c0, c1, c2, c3, c4, c5 = log_series(second, centre)
    c0, c1, c2, c3 = economise(c0, c1, c2, c3, c4, c5, reach)
    return c0 * first, c1 * first, c2 * first, c3 * first


@triton.jit
def far_second_derivative(second, centre, reach, BIAS: tl.constexpr):
    """The cubic in x for the second of `derivatives`: Δ^second·log₂Δ, or Δ / (1 + second·Δ)."""
    if BIAS == 3:
        c0, c1, c2, c3, c4, c5 = power_series(second, centre)
        step = 1.0 / centre
        l0 = tl.log2(centre)
        l1 = 1.4426950408889634 * step
        l2 = -l1 * step * 0.5
        l3 = -l2 * step * 0.6666666667
        l4 = -l3 * step * 0.75
        l5 = -l4 * step * 0.8
        d5 = c0 * l5 + c1 * l4 + c2 * l3 + c3 * l2 + c4 * l1 + c5 * l0
        d4 = c0 * l4 + c1 * l3 + c2 * l2 + c3 * l1 + c4 * l0
        d3 = c0 * l3 + c1 * l2 + c2 * l1 + c3 * l0
        d2 = c0 * l2 + c1 * l1 + c2 * l0
        d1 = c0 * l1 + c1 * l0
        d0 = c0 * l0
    else:
        inner = 1.0 + second * centre
        ratio = second / inner
        d0 = centre / inner
        d1 = 1.0 / (inner * inner)
        d2 = -d1 * ratio
        d3 = -d2 * ratio
        d4 = -d3 * ratio
        d5 = -d4 * ratio
    return economise(d0, d1, d2, d3, d4, d5, reach)


@triton.jit
def cubic(u, w, c0, c1, c2, c3):
    """c0 + c1·x + c2·x² + c3·x³ for x = u + w, u (rows, 1) and w (1, columns): three multiply-adds an element."""
    q0 = c0 + u * (c1 + u * (c2 + u * c3))
    q1 = c1 + u * (2.0 * c2 + 3.0 * c3 * u)
    q2 = c2 + 3.0 * c3 * u
    return q0 + w * (q1 + w * (q2 + w * c3))


@triton.jit
def matmul(a, b, UPCAST: tl.constexpr):
    """a·b in float32; operands are widened under the interpreter, whose bf16 matmul is wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def fold(acc, m, total, s, v, qk_scale, SCALED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Fold a tile's scores s (rows, keys) and values v (keys, width) into the running maximum m and sum total (rows) and
    mix acc (rows, width): online softmax (Dao 2023, algorithm 1).

    SCALED: the scores have been multiplied by `qk_scale`, which is done here otherwise, after the maximum has been taken.
    MASKED: there may be rows that have seen no key yet.
    """
    if SCALED:
        m_new = tl.maximum(m, tl.max(s, 1))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    if SCALED:
        p = tl.exp2(s - shift[:, None])
    else:
        p = tl.exp2(s * qk_scale - shift[:, None])
    decay = tl.exp2(m - shift)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None] + matmul(p.to(v.dtype), v, UPCAST)
    return acc, m_new, total

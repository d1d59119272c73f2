"""The forward pass: online softmax over blocks of keys (Dao 2023, algorithm 1).

Each program (`own_block`) keeps a tile of queries, walks the key blocks that its rows see, and
writes the mixed values and the base-2 log-sum-exp of every row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luban.kernels.flash.tile import (
    add_bias,
    cubic,
    far_bias,
    far_from,
    fetch_tile,
    fold,
    key_blocks,
    load_parameters,
    load_tile,
    matmul,
    own_block,
    row_bounds,
    store_tile,
)


@triton.jit
def _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LIST, first, last, full_first, full_last,
          start, stop, row0, rows, T, S, qk_scale, zero, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          BIAS: tl.constexpr, LINEAR: tl.constexpr, WALK: tl.constexpr, SPARSE: tl.constexpr, FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Fold key blocks [first, last) into the running maximum m, sum total and mix acc.

    Masks are drawn on blocks outside [full_first, full_last) where WALK says SOMETIMES, on all or none otherwise.
    """
    MASKED: tl.constexpr = WALK == 0 or WALK == 3
    for n in range(first, last):
        block = n
        if SPARSE:
            block = tl.load(LIST + n)
        cols = block * BN + tl.arange(0, BN)
        k = fetch_tile(K, b, kv, block * BN, BN, D, FETCH)
        v = fetch_tile(V, b, kv, block * BN, BN, D, FETCH)
        s = matmul(q, tl.trans(k), UPCAST)
        if BIAS > 0:
            if LINEAR:  # −slope·(i − j) up to what is the same for a whole row, which softmax doesn't see
                s = s * qk_scale + (first_number * (cols - (row0 + S - T)).to(tl.float32))[None, :]
            elif WALK == 2 and BIAS == 2:
                s = s * qk_scale + first_number  # the one value of all far distances
            elif WALK == 2:
                centre = (row0 + (S - T) - block * BN).to(tl.float32) + (BM - BN) * 0.5
                c0, c1, c2, c3 = far_bias(first_number, second_number, centre, (BM + BN) * 0.5, BIAS)
                u = (tl.arange(0, BM) - BM * 0.5)[:, None]
                w = (BN * 0.5 - tl.arange(0, BN))[None, :]
                s = s * qk_scale - cubic(u, w, c0, c1, c2, c3)
            else:
                s = add_bias(s * qk_scale, rows[:, None], cols[None, :], TABLE_PTR, first_number, second_number, T, S,
                             zero, BIAS, MASKED)  # fmt: skip
        if WALK == 0:
            s = tl.where((cols[None, :] >= start[:, None]) & (cols[None, :] < stop[:, None]), s, float("-inf"))
        if WALK == 3:  # noqa: SIM102 - this is decided when the kernel is compiled
            if (block < full_first) | (block >= full_last):
                s = tl.where((cols[None, :] >= start[:, None]) & (cols[None, :] < stop[:, None]), s, float("-inf"))
        acc, m, total = fold(acc, m, total, s, v, qk_scale, BIAS > 0, MASKED, UPCAST)
    return acc, m, total


@triton.jit
def forward_kernel(Q, K, V, OUT, LSE, START, STOP, ITEMS, TABLE, PARAMETERS, LISTS, COUNTS,
                   interval_stride, table_stride, list_head, list_row, count_head, T, S, qk_scale, zero, reach,
                   H: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BIAS: tl.constexpr, LINEAR: tl.constexpr, INTERVALS: tl.constexpr,
                   ORDERED: tl.constexpr, SPARSE: tl.constexpr, FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """O (B, H, T, D) and LSE (B, H, T) of one block of queries."""
    b, h, m_block, ITEM = own_block(ITEMS, tl.cdiv(T, BM), H, EACH, True, ORDERED)
    kv = h // GROUP
    row0 = m_block * BM
    rows = row0 + tl.arange(0, BM)
    start, stop = row_bounds(START, STOP, b, interval_stride, rows, T, S, INTERVALS)
    TABLE_PTR = TABLE + h * table_stride
    first_number, second_number = load_parameters(PARAMETERS, TABLE_PTR, h, zero, reach, BIAS)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    first, last, full_first, full_last = key_blocks(
        START, STOP, ITEM, b, interval_stride, row0, T, S, BM, BN, INTERVALS, ORDERED
    )
    q = load_tile(Q, b, h, row0, BM, D)
    if SPARSE:
        LIST = LISTS + h * list_head + m_block * list_row
        count = tl.load(COUNTS + h * count_head + m_block)
        acc, m, total = _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LIST, 0, count,
                              full_first, full_last, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS,
                              LINEAR, 3, True, FETCH, UPCAST)  # fmt: skip
    else:
        if INTERVALS:
            acc, m, total = _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LISTS, first, last,
                                  full_first, full_last, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                  LINEAR, 3, False, FETCH, UPCAST)  # fmt: skip
        else:
            near = 0
            if BIAS > 1:
                near = tl.minimum(tl.maximum(row0 + S - T - far_from(reach, BM, BN, BIAS) + 1, 0) // BN, full_last)
                acc, m, total = _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LISTS, 0,
                                      near, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                      LINEAR, 2, False, FETCH, UPCAST)  # fmt: skip
            acc, m, total = _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LISTS, near,
                                  full_last, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                  LINEAR, 1, False, FETCH, UPCAST)  # fmt: skip
            acc, m, total = _walk(acc, m, total, q, K, V, b, kv, TABLE_PTR, first_number, second_number, LISTS, full_last,
                                  last, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                  LINEAR, 0, False, FETCH, UPCAST)  # fmt: skip
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(
        nothing, float("inf"), m + tl.log2(tl.where(nothing, 1.0, total))
    )  # exp2(s − ∞) = 0 in the backward pass
    if LINEAR:
        lse -= first_number * (rows - row0).to(tl.float32)
    store_tile(OUT, b, h, row0, out, BM, D)
    tl.store(LSE + (b * H + h) * T + rows, lse, mask=rows < T)

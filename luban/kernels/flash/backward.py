"""The backward pass: scores are computed again, tile by tile (Dao 2023, algorithm 2).

Two kernels, neither with atomics on its main path, so that results repeat bit for bit: the first keeps a tile of
queries and walks its keys (dQ, and the gradients of a learned distance bias), the second keeps a tile of keys and
walks the queries that see it (dK, dV, over all query heads of the group).
"""

from __future__ import annotations

import triton
import triton.language as tl

from luban.kernels.flash.tile import (
    add_bias,
    column_bounds,
    cubic,
    derivatives,
    far_bias,
    far_from,
    far_second_derivative,
    fetch_tile,
    key_blocks,
    load_parameters,
    load_tile,
    matmul,
    own_block,
    query_blocks,
    row_bounds,
    store_tile,
)


@triton.jit
def _walk_queries(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, TABLE_PTR, first_number, second_number, LIST, first, last,
                  first_row, past_row, col0, cols, T, S, qk_scale, zero, D: tl.constexpr, BM: tl.constexpr,
                  BN: tl.constexpr, BIAS: tl.constexpr, LINEAR: tl.constexpr, WALK: tl.constexpr, WHOLE: tl.constexpr,
                  SPARSE: tl.constexpr, FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Fold query blocks [first, last) into dk and dv of one tile of keys. Tiles of scores are (BN, BM) throughout."""
    MASKED: tl.constexpr = WALK == 0 or WALK == 3
    for n in range(first, last):
        block = n
        if SPARSE:
            block = tl.load(LIST + n)
        rows = block * BM + tl.arange(0, BM)
        q = fetch_tile(Q, b, h, block * BM, BM, D, FETCH)
        do = fetch_tile(DO, b, h, block * BM, BM, D, FETCH)
        if MASKED and not WHOLE:
            lse = tl.load(LSE + rows, mask=rows < T, other=float("inf"))
            delta = tl.load(DELTA + rows, mask=rows < T, other=0.0)
        else:
            lse = tl.load(LSE + rows)
            delta = tl.load(DELTA + rows)
        s = matmul(k, tl.trans(q), UPCAST) * qk_scale
        if LINEAR:  # the row's share of −slope·(i − j) goes to its log-sum-exp
            s += (first_number * (cols - col0).to(tl.float32))[:, None]
            lse += first_number * (rows + (S - T) - col0).to(tl.float32)
        elif WALK == 2 and BIAS == 2:
            s += first_number
        elif WALK == 2 and BIAS > 2:
            centre = (block * BM + (S - T) - col0).to(tl.float32) + (BM - BN) * 0.5
            c0, c1, c2, c3 = far_bias(first_number, second_number, centre, (BM + BN) * 0.5, BIAS)
            u = (BN * 0.5 - tl.arange(0, BN))[:, None]
            w = (tl.arange(0, BM) - BM * 0.5)[None, :]
            s -= cubic(u, w, c0, c1, c2, c3)
        else:
            s = add_bias(s, rows[None, :], cols[:, None], TABLE_PTR, first_number, second_number, T, S, zero, BIAS,
                         MASKED)  # fmt: skip
        p = tl.exp2(s - lse[None, :])
        if MASKED:  # where only some tiles need it, too: a branch costs more
            p = tl.where((rows[None, :] >= first_row[:, None]) & (rows[None, :] < past_row[:, None]), p, 0.0)
        dv += matmul(p.to(do.dtype), do, UPCAST)
        dp = matmul(v, tl.trans(do), UPCAST)
        ds = p * (dp - delta[None, :])
        dk += matmul(ds.to(q.dtype), q, UPCAST)
    return dk, dv


@triton.jit
def keys_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, SEEING, ITEMS, TABLE, PARAMETERS, LISTS, COUNTS,
                seeing_stride, table_stride, list_head, list_row, count_head, T, S, qk_scale, scale, zero, reach,
                H: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BIAS: tl.constexpr, LINEAR: tl.constexpr, INTERVALS: tl.constexpr,
                ORDERED: tl.constexpr, WHOLE: tl.constexpr, SPARSE: tl.constexpr, FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """DK and DV (B, K, S, D) of one block of keys."""
    b, kv, n_block, ITEM = own_block(ITEMS, tl.cdiv(S, BN), H // GROUP, EACH, False, ORDERED)
    col0 = n_block * BN
    cols = col0 + tl.arange(0, BN)
    k = load_tile(K, b, kv, col0, BN, D)
    v = load_tile(V, b, kv, col0, BN, D)
    SEEING += b * seeing_stride
    first_row, past_row = column_bounds(SEEING, cols, T, S, INTERVALS)
    first, last, full_first, full_last = query_blocks(SEEING, ITEM, col0, T, S, BM, BN, INTERVALS, ORDERED)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    for g in range(0, GROUP):
        h = kv * GROUP + g
        TABLE_PTR = TABLE + h * table_stride
        first_number, second_number = load_parameters(PARAMETERS, TABLE_PTR, h, zero, reach, BIAS)
        LSEh = LSE + (b * H + h) * T
        DELTAh = DELTA + (b * H + h) * T
        if SPARSE:
            LIST = LISTS + h * list_head + n_block * list_row
            count = tl.load(COUNTS + h * count_head + n_block)
            dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number, LIST,
                                   0, count, first_row, past_row, col0, cols, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                   LINEAR, 3, WHOLE, True, FETCH, UPCAST)  # fmt: skip
        elif INTERVALS:
            dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number, LISTS,
                                   first, last, first_row, past_row, col0, cols, T, S, qk_scale, zero, D, BM, BN, BIAS,
                                   LINEAR, 3, WHOLE, False, FETCH, UPCAST)  # fmt: skip
        else:
            dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number, LISTS,
                                   first, full_first, first_row, past_row, col0, cols, T, S, qk_scale, zero, D, BM, BN,
                                   BIAS, LINEAR, 0, WHOLE, False, FETCH, UPCAST)  # fmt: skip
            far = full_last
            if BIAS > 1:
                far = tl.cdiv(tl.maximum(far_from(reach, BM, BN, BIAS) + col0 + BN - 1 - (S - T), 0), BM)
                far = tl.maximum(tl.minimum(far, full_last), full_first)
            dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number, LISTS,
                                   full_first, far, first_row, past_row, col0, cols, T, S, qk_scale, zero, D, BM, BN,
                                   BIAS, LINEAR, 1, WHOLE, False, FETCH, UPCAST)  # fmt: skip
            if BIAS > 1:
                dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number,
                                       LISTS, far, full_last, first_row, past_row, col0, cols, T, S, qk_scale, zero, D,
                                       BM, BN, BIAS, LINEAR, 2, WHOLE, False, FETCH, UPCAST)  # fmt: skip
            dk, dv = _walk_queries(dk, dv, k, v, Q, DO, LSEh, DELTAh, b, h, TABLE_PTR, first_number, second_number, LISTS,
                                   full_last, last, first_row, past_row, col0, cols, T, S, qk_scale, zero, D, BM, BN,
                                   BIAS, LINEAR, 0, WHOLE, False, FETCH, UPCAST)  # fmt: skip
    store_tile(DK, b, kv, col0, dk * scale, BN, D)
    store_tile(DV, b, kv, col0, dv, BN, D)


@triton.jit
def _walk_keys(dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number,
               BUCKET, GRAD_ROW, LIST, first, last, full_first, full_last, start, stop, row0, rows, T, S, qk_scale, zero,
               D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, LINEAR: tl.constexpr,
               MOMENTS: tl.constexpr, BUCKETS: tl.constexpr, WALK: tl.constexpr, SPARSE: tl.constexpr, PROBE: tl.constexpr,
               FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Fold key blocks [first, last) into dq, and into what the gradients of the bias's parameters are made of: g1 and g2,
    sums of ds × the bias's derivatives, b1 and b2, sums of p × those, and `off`, the sum of ds. PROBE: only into `off`,
    with a delta of 0."""
    MASKED: tl.constexpr = WALK == 0 or WALK == 3
    for n in range(first, last):
        block = n
        if SPARSE:
            block = tl.load(LIST + n)
        cols = block * BN + tl.arange(0, BN)
        k = fetch_tile(K, b, kv, block * BN, BN, D, FETCH)
        v = fetch_tile(V, b, kv, block * BN, BN, D, FETCH)
        s = matmul(q, tl.trans(k), UPCAST) * qk_scale
        if LINEAR:  # the row's share of −slope·(i − j) is in its log-sum-exp
            s += (first_number * (cols - (row0 + S - T)).to(tl.float32))[None, :]
        elif WALK == 2 and BIAS == 2:
            s += first_number
        elif WALK == 2 and BIAS > 2:
            centre = (row0 + (S - T) - block * BN).to(tl.float32) + (BM - BN) * 0.5
            c0, c1, c2, c3 = far_bias(1.0, second_number, centre, (BM + BN) * 0.5, BIAS)
            u = (tl.arange(0, BM) - BM * 0.5)[:, None]
            w = (BN * 0.5 - tl.arange(0, BN))[None, :]
            shape = cubic(u, w, c0, c1, c2, c3)
            s -= first_number * shape
        else:
            s = add_bias(s, rows[:, None], cols[None, :], TABLE_PTR, first_number, second_number, T, S, zero, BIAS,
                         MASKED)  # fmt: skip
        p = tl.exp2(s - lse[:, None])
        if WALK == 0:
            p = tl.where((cols[None, :] >= start[:, None]) & (cols[None, :] < stop[:, None]), p, 0.0)
        if WALK == 3:  # noqa: SIM102 - this is decided when the kernel is compiled
            if (block < full_first) | (block >= full_last):
                p = tl.where((cols[None, :] >= start[:, None]) & (cols[None, :] < stop[:, None]), p, 0.0)
        ds = p * (matmul(do, tl.trans(v), UPCAST) - delta[:, None])
        if PROBE:
            off += tl.sum(ds, 1)
        else:
            if MOMENTS:
                if WALK == 2:
                    d0, d1, d2, d3 = far_second_derivative(second_number, centre, (BM + BN) * 0.5, BIAS)
                    by_first, by_second = shape, cubic(u, w, d0, d1, d2, d3)
                else:
                    by_first, by_second = derivatives(
                        rows[:, None], cols[None, :], first_number, second_number, T, S, BIAS, MASKED
                    )
                g1 += tl.sum(ds * by_first, 1)
                g2 += tl.sum(ds * by_second, 1)
                b1 += tl.sum(p * by_first, 1)
                b2 += tl.sum(p * by_second, 1)
                off += tl.sum(ds, 1)
            if BUCKETS > 0 and WALK == 2:
                g1 += tl.sum(ds, 1)
            elif BUCKETS > 0:
                away = rows[:, None] + (S - T) - cols[None, :] + zero
                bucket = tl.load(BUCKET + tl.minimum(tl.maximum(away, 0), zero * 2))
                live = tl.where(ds == 0.0, -1, bucket)
                low = tl.min(tl.where(live < 0, BUCKETS, live))
                for which in range(low, tl.max(live) + 1):
                    tl.atomic_add(GRAD_ROW + which, tl.sum(tl.where(bucket == which, ds, 0.0)))
            dq += matmul(ds.to(k.dtype), k, UPCAST)
    return dq, g1, g2, off, b1, b2


@triton.jit
def queries_kernel(Q, K, V, OUT, DO, LSE, DELTA, DQ, START, STOP, ITEMS, TABLE, PARAMETERS, BUCKET, GRAD, LISTS, COUNTS,
                   interval_stride, table_stride, list_head, list_row, count_head, T, S, qk_scale, scale, zero, reach,
                   H: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BIAS: tl.constexpr, LINEAR: tl.constexpr, MOMENTS: tl.constexpr,
                   BUCKETS: tl.constexpr, INTERVALS: tl.constexpr, ORDERED: tl.constexpr, SPARSE: tl.constexpr,
                   FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """DQ (B, H, T, D) of one block of queries, its share of the bias's gradients in GRAD, and DELTA (B, H, T), Σ_d O·dO =
    Σ_keys P·dP, which softmax's backward subtracts and the keys' kernel reads.

    O was rounded, which a bias's gradients would show, as they are sums in which much cancels. Those of two numbers are
    freed of it at the end; a table's can't be, so that DELTA is then found from P·dP in a turn of its own.
    """
    blocks = tl.cdiv(T, BM)
    b, h, m_block, ITEM = own_block(ITEMS, blocks, H, EACH, True, ORDERED)
    row0 = m_block * BM
    rows = row0 + tl.arange(0, BM)
    q = load_tile(Q, b, h, row0, BM, D)
    do = load_tile(DO, b, h, row0, BM, D)
    lse = tl.load(LSE + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
    if BUCKETS > 0:
        delta = tl.zeros([BM], tl.float32)  # for the first turn, which finds it
    else:
        o = load_tile(OUT, b, h, row0, BM, D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    kv = h // GROUP
    start, stop = row_bounds(START, STOP, b, interval_stride, rows, T, S, INTERVALS)
    TABLE_PTR = TABLE + h * table_stride
    first_number, second_number = load_parameters(PARAMETERS, TABLE_PTR, h, zero, reach, BIAS)
    if LINEAR:
        lse += first_number * (rows - row0).to(tl.float32)
    place = (b * H + h) * blocks + m_block
    GRAD_ROW = GRAD + place * BUCKETS
    dq = tl.zeros([BM, D], tl.float32)
    g1 = tl.zeros([BM], tl.float32)
    g2 = tl.zeros([BM], tl.float32)
    off = tl.zeros([BM], tl.float32)
    b1 = tl.zeros([BM], tl.float32)
    b2 = tl.zeros([BM], tl.float32)
    first, last, full_first, full_last = key_blocks(
        START, STOP, ITEM, b, interval_stride, row0, T, S, BM, BN, INTERVALS, ORDERED
    )
    TURNS: tl.constexpr = 2 if BUCKETS > 0 else 1
    for turn in tl.static_range(TURNS):
        if SPARSE:
            LIST = LISTS + h * list_head + m_block * list_row
            count = tl.load(COUNTS + h * count_head + m_block)
            dq, g1, g2, off, b1, b2 = _walk_keys(
                dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number, BUCKET, GRAD_ROW,
                LIST, 0, count, full_first, full_last, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS, LINEAR, MOMENTS,
                BUCKETS, 3, True, turn < TURNS - 1, FETCH, UPCAST)  # fmt: skip
        elif INTERVALS:
            dq, g1, g2, off, b1, b2 = _walk_keys(
                dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number, BUCKET, GRAD_ROW,
                LISTS, first, last, full_first, full_last, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS, LINEAR, MOMENTS,
                BUCKETS, 3, False, turn < TURNS - 1, FETCH, UPCAST)  # fmt: skip
        else:
            near = 0
            if BIAS > 1:
                near = tl.minimum(tl.maximum(row0 + S - T - far_from(reach, BM, BN, BIAS) + 1, 0) // BN, full_last)
                dq, g1, g2, off, b1, b2 = _walk_keys(
                    dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number, BUCKET, GRAD_ROW,
                    LISTS, 0, near, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS, LINEAR, MOMENTS,
                    BUCKETS, 2, False, turn < TURNS - 1, FETCH, UPCAST)  # fmt: skip
                if BUCKETS > 0 and turn == TURNS - 1:
                    tl.atomic_add(GRAD_ROW + tl.load(BUCKET + tl.minimum(zero + reach, zero * 2)), tl.sum(g1))
            dq, g1, g2, off, b1, b2 = _walk_keys(
                dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number, BUCKET, GRAD_ROW,
                LISTS, near, full_last, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS, LINEAR, MOMENTS,
                BUCKETS, 1, False, turn < TURNS - 1, FETCH, UPCAST)  # fmt: skip
            dq, g1, g2, off, b1, b2 = _walk_keys(
                dq, g1, g2, off, b1, b2, q, do, lse, delta, K, V, b, kv, TABLE_PTR, first_number, second_number, BUCKET, GRAD_ROW,
                LISTS, full_last, last, 0, 0, start, stop, row0, rows, T, S, qk_scale, zero, D, BM, BN, BIAS, LINEAR, MOMENTS,
                BUCKETS, 0, False, turn < TURNS - 1, FETCH, UPCAST)  # fmt: skip
        if turn < TURNS - 1:
            delta = off
    tl.store(DELTA + (b * H + h) * T + rows, delta, mask=rows < T)
    store_tile(DQ, b, h, row0, dq * scale, BM, D)
    if MOMENTS:
        inside = rows < T  # a row's ds sum to 0 but for the rounding of O in delta
        tl.store(GRAD + place * 2, tl.sum(tl.where(inside, g1 - off * b1, 0.0)))
        tl.store(GRAD + place * 2 + 1, tl.sum(tl.where(inside, g2 - off * b2, 0.0)))

"""Attention of packed tokens to keys and values in blocks, in Triton: prompts' chunks and single tokens by one kernel.

A program keeps a tile of rows, the queries of some consecutive tokens of a sequence times the heads of one group, and
walks the blocks of keys that they see, by the sequence's table. Where there are few single tokens, each is given to
several programs, which take a share of its keys each (Dao et al. 2023, Flash-Decoding), and a second kernel joins their
results. Keys of a chunk itself lie in a row where they were computed, and are read there by whole tiles.

N packed tokens, H query heads, K key heads, G = H / K, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from luban.kernels.flash.tile import add_bias, fetch_tile, fold, matmul


@triton.jit
def _walk(acc, m, total, q, KEYS, VALUES, SCALES, TABLE, kv_stride, scale_stride, NEW_KEYS, NEW_VALUES, kv, new_row, origin, first, last, end,
          positions, valid, BIAS_TABLE, first_number, second_number, qk_scale, zero, window, D: tl.constexpr,
          DP: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
          MASKED: tl.constexpr, EIGHT_BITS: tl.constexpr, NEW: tl.constexpr, FETCH: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """Fold key tiles [first, last) into the running maximum m, sum total and mix acc; `end` keys are there.

    Tiles are counted from the key `origin` on. NEW: they are read where they were computed, `origin` in row `new_row`.
    MASKED: some rows don't see some keys, or the last tile reaches past the end.
    """
    dims = tl.arange(0, DP)
    for n in range(first, last):
        cols = origin + n * BN + tl.arange(0, BN)
        inside = cols < end
        if NEW:
            k = fetch_tile(NEW_KEYS, kv * 0, kv, new_row + n * BN, BN, DP, FETCH)
            v = fetch_tile(NEW_VALUES, kv * 0, kv, new_row + n * BN, BN, DP, FETCH)
            if MASKED:  # others' values, which may be NaN
                v = tl.where(inside[:, None], v, 0.0)
        else:
            there = dims[None, :] < D
            if MASKED:
                blocks = tl.load(TABLE + cols // SIZE, mask=inside, other=0)
                there = inside[:, None] & there
            else:
                blocks = tl.load(TABLE + cols // SIZE)
            slots = blocks.to(tl.int64) * SIZE + cols % SIZE
            at = slots[:, None] * kv_stride + dims[None, :]
            k = tl.load(KEYS + at, mask=there, other=0.0)  # what stands past the end may be NaN
            v = tl.load(VALUES + at, mask=there, other=0.0)
            if EIGHT_BITS:
                k_scale = tl.load(SCALES + slots * scale_stride, mask=inside, other=0.0)
                v_scale = tl.load(SCALES + slots * scale_stride + 1, mask=inside, other=0.0)
                k, v = k.to(q.dtype), (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        s = matmul(q, tl.trans(k), UPCAST)
        if EIGHT_BITS:
            s = s * k_scale[None, :]
        if BIAS > 0:
            s = add_bias(s * qk_scale, positions[:, None], cols[None, :], BIAS_TABLE, first_number, second_number, 0, 0,
                         zero, BIAS, True)  # fmt: skip
        if MASKED:
            seen = (cols[None, :] <= positions[:, None]) & valid[:, None] & inside[None, :]
            if WINDOW:
                seen = seen & (positions[:, None] - cols[None, :] < window)
            s = tl.where(seen, s, float("-inf"))
        acc, m, total = fold(acc, m, total, s, v, qk_scale, BIAS > 0, MASKED, UPCAST)
    return acc, m, total


@triton.jit(
    do_not_specialize=["table_stride", "zero", "window"]
)  # they change from step to step: no new kernel for each
def paged_kernel(Q, KEYS, VALUES, NEW_KEYS, NEW_VALUES, SCALES, OUT, LSE, ITEMS, TABLES, BIAS_TABLES, NUMBERS, q_token, q_head,
                 kv_slot, out_split, out_token, item_stride, table_stride, bias_stride, lse_split, qk_scale, zero, window,
                 G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 SIZE: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, EIGHT_BITS: tl.constexpr,
                 NEW: tl.constexpr, FETCH: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One item (sequence, row of its first token, tokens, position of the first), one key head, one share of the keys.

    Grid (items, K, splits). SPLIT: OUT is float32 (splits, N, H, D), the mix of this share, and LSE (splits, N, H) its
    log-sum-exp in base 2; else OUT is (N, H, D). NEW: an item's fifth number is the position at which its chunk begins; keys
    from there on are read from NEW_KEYS and NEW_VALUES, as `fetch_tile` takes them: (1, K, N, D). EIGHT_BITS: those of the pool are in 8
    bits, times SCALES (slots, K, 2).
    """
    ITEM = ITEMS + tl.program_id(0) * item_stride
    kv, split = tl.program_id(1), tl.program_id(2)
    sequence, row, tokens, position = tl.load(ITEM), tl.load(ITEM + 1), tl.load(ITEM + 2), tl.load(ITEM + 3)
    rows, dims = tl.arange(0, BM), tl.arange(0, DP)
    token, head = rows // G, kv * G + rows % G
    valid = token < tokens
    positions = position + token
    there = valid[:, None] & (dims[None, :] < D)
    at = (row + token).to(tl.int64)
    q = tl.load(Q + at[:, None] * q_token + head[:, None] * q_head + dims[None, :], mask=there, other=0.0)
    BIAS_TABLE = BIAS_TABLES + head[:, None] * bias_stride
    first_number, second_number = 0.0, 0.0
    if BIAS == 1 or BIAS > 2:
        first_number = tl.load(NUMBERS + head * 2)[:, None]
        second_number = tl.load(NUMBERS + head * 2 + 1)[:, None]
    end = position + tokens
    begin = end  # of the keys that are read where they were computed
    if NEW:
        begin = tl.load(ITEM + 4)
    first, last = 0, tl.cdiv(begin, BN)
    if WINDOW:
        first = tl.minimum(tl.maximum(position - window + 1, 0) // BN, last)
    share = tl.cdiv(last - first, tl.num_programs(2))
    first += split * share
    last = tl.minimum(first + share, last)
    whole = tl.maximum(
        tl.minimum(tl.minimum(position, begin) // BN, last), first
    )  # tiles before it are seen by all rows
    if WINDOW:
        whole = first
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    TABLE = TABLES + sequence * table_stride
    KEYS += kv * D
    VALUES += kv * D
    SCALES += kv * 2
    scale_slot = 2 * tl.num_programs(1)
    acc, m, total = _walk(acc, m, total, q, KEYS, VALUES, SCALES, TABLE, kv_slot, scale_slot, NEW_KEYS, NEW_VALUES, kv, 0, 0, first, whole, begin,
                          positions, valid, BIAS_TABLE, first_number, second_number, qk_scale, zero, window, D, DP, BN,
                          SIZE, BIAS, WINDOW, False, EIGHT_BITS, False, FETCH, UPCAST)  # fmt: skip
    acc, m, total = _walk(acc, m, total, q, KEYS, VALUES, SCALES, TABLE, kv_slot, scale_slot, NEW_KEYS, NEW_VALUES, kv, 0, 0, whole, last, begin,
                          positions, valid, BIAS_TABLE, first_number, second_number, qk_scale, zero, window, D, DP, BN,
                          SIZE, BIAS, WINDOW, True, EIGHT_BITS, False, FETCH, UPCAST)  # fmt: skip
    if NEW:
        before = position - begin  # keys of the chunk before this item's
        first, last, whole = 0, tl.cdiv(end - begin, BN), before // BN
        if WINDOW:
            first = tl.maximum(before - window + 1, 0) // BN
            whole = first
        acc, m, total = _walk(acc, m, total, q, KEYS, VALUES, SCALES, TABLE, kv_slot, scale_slot, NEW_KEYS, NEW_VALUES, kv, row - before, begin,
                              first, whole, end, positions, valid, BIAS_TABLE, first_number, second_number, qk_scale, zero,
                              window, D, DP, BN, SIZE, BIAS, WINDOW, False, False, True, FETCH, UPCAST)  # fmt: skip
        acc, m, total = _walk(acc, m, total, q, KEYS, VALUES, SCALES, TABLE, kv_slot, scale_slot, NEW_KEYS, NEW_VALUES, kv, row - before, begin,
                              whole, last, end, positions, valid, BIAS_TABLE, first_number, second_number, qk_scale, zero,
                              window, D, DP, BN, SIZE, BIAS, WINDOW, True, False, True, FETCH, UPCAST)  # fmt: skip
    nothing = total == 0.0
    mixed = acc / tl.where(nothing, 1.0, total)[:, None]
    to = OUT + split * out_split + at[:, None] * out_token + head[:, None] * D + dims[None, :]
    tl.store(to, mixed.to(OUT.dtype.element_ty), mask=there)
    if SPLIT:
        lse = tl.where(nothing, float("-inf"), m + tl.log2(tl.where(nothing, 1.0, total)))
        tl.store(LSE + split * lse_split + at * (tl.num_programs(1) * G) + head, lse, mask=valid)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    PARTS, LSE, OUT, ROWS, out_split, lse_split, H, splits, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr
):
    """Results of all shares of one token's keys, by their log-sum-exps; of no token where its row is negative. Grid (rows, H)."""
    row, head = tl.load(ROWS + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    if row < 0:
        return
    shares, dims = tl.arange(0, SPLITS), tl.arange(0, DP)
    lse = tl.load(LSE + shares * lse_split + row * H + head, mask=shares < splits, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    at = (row * H + head) * D + dims
    there = (shares[:, None] < splits) & (dims[None, :] < D)
    parts = tl.load(PARTS + shares[:, None] * out_split + at[None, :], mask=there, other=0.0)
    mixed = tl.sum(parts * (weights / tl.sum(weights, 0))[:, None], 0)
    tl.store(OUT + at, mixed.to(OUT.dtype.element_ty), mask=dims < D)


@triton.jit
def store_kernel(
    K, V, KEYS, VALUES, SLOTS, k_token, k_head, v_token, v_head, D: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys and values of one new token into its slot. Grid (tokens,)."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    slot, inside = tl.load(SLOTS + token), at < ROW
    head, dim = at // D, at % D
    k = tl.load(K + token * k_token + head * k_head + dim, mask=inside)
    v = tl.load(V + token * v_token + head * v_head + dim, mask=inside)
    tl.store(KEYS + slot * ROW + at, k.to(KEYS.dtype.element_ty), mask=inside)
    tl.store(VALUES + slot * ROW + at, v.to(VALUES.dtype.element_ty), mask=inside)


@triton.jit
def store_scaled_kernel(
    K, V, KEYS, VALUES, SCALES, SLOTS, k_token, k_head, v_token, v_head, HEADS: tl.constexpr, HEADS2: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """The same in 8 bits: of each head all numbers by one scale, which makes the largest 448. Grid (tokens,)."""
    token, heads = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS2)
    slot, head, dim = tl.load(SLOTS + token), heads[:, None], tl.arange(0, DP)[None, :]
    inside, to = (head < HEADS) & (dim < D), (slot * HEADS + head) * D + dim
    at = SCALES + (slot * HEADS + heads) * 2
    k = tl.load(K + token * k_token + head * k_head + dim, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(k), 1), 1e-12) / 448.0
    tl.store(KEYS + to, (k / scale[:, None]).to(KEYS.dtype.element_ty), mask=inside)
    tl.store(at, scale, mask=heads < HEADS)
    v = tl.load(V + token * v_token + head * v_head + dim, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(v), 1), 1e-12) / 448.0
    tl.store(VALUES + to, (v / scale[:, None]).to(VALUES.dtype.element_ty), mask=inside)
    tl.store(at + 1, scale, mask=heads < HEADS)

"""Launches of the paged attention kernel: what a forward's layers share, and one layer's attention.

N packed tokens, C sequences, M blocks of a table, H query heads, K key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from luban.kernels.available import INTERPRETED
from luban.kernels.distance import LOG2E, DistanceBias
from luban.kernels.flash.launch import KINDS, Tiles, fetches_tiles, readable, walked
from luban.kernels.paged import join_kernel, paged_kernel, store_kernel, store_scaled_kernel

TILE = 16 if INTERPRETED else 64  # keys of a tile, fewer where heads are wide
SINGLE_ROWS = 16  # rows of a tile for single tokens, the fewest that matmuls of tiles take
CHUNK_ROWS = 32 if INTERPRETED else 128  # rows of a tile for chunks of prompts, fewer where heads are wide
PROGRAMS = 264  # that fill the device: two on each of an H100's multiprocessors
MAX_SPLITS = 32
MIN_TILES = 4  # of a share of the keys


@dataclass(frozen=True)
class PagedWork:
    """Which programs there are: made once a forward for layers with one number of heads a group."""

    # (items, 4) int32: sequence, row of its first token, tokens, position of the first; of chunks (items, 5): then the
    # position at which the chunk begins
    items: Tensor
    rows: int  # BM
    splits: int  # shares of every item's keys
    single_rows: Tensor | None  # (items,) int32: rows in which shares are joined


def padded_width(width: int) -> int:
    """Of a head in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def paged_tiles(rows: int, row_bytes: int, own: bool) -> Tiles:
    """Settings of the kernel for a tile of so many rows. With 8 warps it takes 130 registers for chunks that read their own keys in
    place, two more than let a second program in: narrow heads get 4, as in training.

    Args:
        rows: of the tile. row_bytes: as of `paged_work`. own: whether a chunk's own keys are read where they were computed.
    """
    narrower = _narrower(row_bytes)
    warps = 4 if rows <= 64 or (own and row_bytes <= 128) else 8
    return Tiles(rows, max(16, TILE // narrower), warps, {1: 3, 2: 2, 4: 1}[narrower])


def chunk_tokens(heads: int, key_heads: int, row_bytes: int) -> int:
    """Tokens of the pieces that chunks of prompts are divided into. Args: as of `paged_work`."""
    return _rows(CHUNK_ROWS // _narrower(row_bytes), heads // key_heads) // (heads // key_heads)


def paged_work(
    starts: Sequence[int],
    counts: Sequence[int],
    heads: int,
    key_heads: int,
    row_bytes: int,
    device: torch.device,
    *,
    single_items: Tensor | None = None,
    chunk_items: Tensor | None = None,
    invariant: bool = False,
) -> list[PagedWork]:
    """Work of chunks and of single tokens, where there are any.

    Args:
        starts: position of every sequence's first new token. counts: its new tokens.
        row_bytes: of one head's query, rounded up to a power of two of numbers.
        single_items, chunk_items: `PagedWork.items` on the device already; `starts` then only bound the keys. Items of row −1
            without tokens are no work.
        invariant: one size of tile for all tokens and undivided keys, so that what a token gets depends on nothing else.
    """
    group, longest = heads // key_heads, max(starts, default=0) + 1
    single_rows = _rows(SINGLE_ROWS, group)
    chunk_rows = single_rows if invariant else _rows(CHUNK_ROWS // _narrower(row_bytes), group)
    if single_items is None and chunk_items is None:
        chunks, singles = _divided(starts, counts, chunk_rows // group)
        longest = max((item[3] for item in singles), default=0) + 1
        chunk_items = torch.tensor(chunks, dtype=torch.int32).to(device) if chunks else None
        single_items = torch.tensor(singles, dtype=torch.int32).to(device) if singles else None
    work = []
    if chunk_items is not None:
        work.append(PagedWork(chunk_items, chunk_rows, 1, None))
    if single_items is not None:
        wanted = PROGRAMS // max(1, len(single_items) * key_heads)
        splits = 1 if invariant else max(1, min(wanted, MAX_SPLITS, longest // (TILE * MIN_TILES)))
        work.append(PagedWork(single_items, single_rows, splits, single_items[:, 1].contiguous()))
    return work


Item = tuple[int, ...]


def _divided(starts: Sequence[int], counts: Sequence[int], step: int) -> tuple[list[Item], list[Item]]:
    """Items of chunks, the longest first, so that none is waited for at the end, and of single tokens."""
    chunks, singles, row = [], [], 0
    for sequence, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count == 1:
            singles.append((sequence, row, 1, start))
        else:
            chunks += [(sequence, row + at, min(step, count - at), start + at, start) for at in range(0, count, step)]
        row += count
    return sorted(chunks, key=lambda item: -item[3]), singles


def _rows(rows: int, group: int) -> int:
    """Of a tile, which holds the heads of a group at least."""
    return max(rows, 1 << (group - 1).bit_length())


def _narrower(row_bytes: int) -> int:
    """How many times fewer rows a tile has than those of narrow heads, so that tiles fit into shared memory."""
    return 1 if row_bytes <= 256 else 2 if row_bytes <= 512 else 4


@dataclass(frozen=True)
class PagedBias:
    """A distance bias in the form that the kernel reads."""

    kind: int
    numbers: Tensor | None
    table: Tensor | None  # (H, 2S − 1) float32, in base 2
    zero: int

    @classmethod
    def of(cls, bias: DistanceBias | None) -> PagedBias:
        """Of a position method."""
        if bias is None:
            return cls(KINDS["none"], None, None, 0)
        table = (bias.table().float() * LOG2E).contiguous() if bias.form == "buckets" else None
        return cls(KINDS[bias.form], bias.numbers(), table, bias.zero)


def store(k_NKD: Tensor, v_NKD: Tensor, keys: Tensor, values: Tensor, scales: Tensor | None, slots_N: Tensor) -> None:
    """Put keys and values of the new tokens into the pool, (slots, K, D) both, contiguous.

    Args:
        scales: (slots, K, 2) float32, to be set, of a pool in 8 bits.
    """
    N, K, D = k_NKD.shape
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_NKD, v_NKD))
    if scales is not None:
        strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
        sizes = {"HEADS": K, "HEADS2": triton.next_power_of_2(K), "D": D, "DP": triton.next_power_of_2(D)}
        store_scaled_kernel[(N,)](k, v, keys, values, scales, slots_N, *strides, **sizes, num_warps=2)
        return
    store_kernel[(N,)](
        k,
        v,
        keys,
        values,
        slots_N,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        D=D,
        ROW=K * D,
        BLOCK=triton.next_power_of_2(K * D),
        num_warps=2,
    )


def paged_attention(
    q_HND: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: Tensor | None,
    tables_CM: Tensor,
    work: Sequence[PagedWork],
    bias: PagedBias,
    *,
    block_size: int,
    window: int | None,
    scale: float,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(N, H, D), contiguous. Keys and values of the new tokens are in the pool already.

    Args:
        keys, values: (slots, K, D), contiguous. scales: (slots, K, 2) float32 of those in 8 bits, else None. tables_CM: int32.
        window: as in `AttentionShape`.
        new: keys and values of the new tokens, (N, K, D) both: chunks read their own ones there, by whole tiles. None: all are
            read from the pool, so that a token's result doesn't depend on where its chunk begins.
    """
    (H, N, D), K = q_HND.shape, keys.shape[1]
    wide = values.dtype if scales is None else q_HND.dtype
    out = torch.empty(N, H, D, dtype=wide, device=q_HND.device)
    q_HND = q_HND.to(wide)
    q_HND = q_HND if q_HND.stride(2) == 1 else q_HND.contiguous()
    padded = padded_width(D)
    for each in work:
        in_place = new is not None and each.items.shape[1] > 4
        t = paged_tiles(each.rows, padded * wide.itemsize, in_place)
        split, own, fetch = each.splits > 1, None, False
        if new is not None and in_place:
            fetch = fetches_tiles(q_HND.device) and D * wide.itemsize % 16 == 0
            own = [walked(readable(x.transpose(0, 1)[None], fetch), t.cols, padded, fetch) for x in new]
        target, lse = out, out
        if split:
            target = torch.empty(each.splits, N, H, D, dtype=torch.float32, device=out.device)
            lse = torch.empty(each.splits, N, H, dtype=torch.float32, device=out.device)
        paged_kernel[(len(each.items), K, each.splits)](
            q_HND,
            keys,
            values,
            *(own or (keys, values)),
            out if scales is None else scales,
            target,
            lse,
            each.items,
            tables_CM,
            out if bias.table is None else bias.table,
            out if bias.numbers is None else bias.numbers,
            q_HND.stride(1),
            q_HND.stride(0),
            K * D,
            N * H * D,
            H * D,
            each.items.stride(0),
            tables_CM.stride(0),
            0 if bias.table is None else bias.table.stride(0),
            N * H,
            scale * LOG2E,
            bias.zero,
            window or 0,
            G=H // K,
            D=D,
            DP=padded,
            BM=t.rows,
            BN=t.cols,
            SIZE=block_size,
            BIAS=bias.kind,
            WINDOW=window is not None,
            SPLIT=split,
            EIGHT_BITS=scales is not None,
            NEW=own is not None,
            FETCH=fetch,
            UPCAST=INTERPRETED,
            num_warps=t.warps,
            num_stages=t.stages,
            maxnreg=t.registers,
        )
        if split:
            join_kernel[(len(each.items), H)](
                target, lse, out, each.single_rows, N * H * D, N * H, H, each.splits, D=D, DP=padded, SPLITS=MAX_SPLITS
            )
    return out

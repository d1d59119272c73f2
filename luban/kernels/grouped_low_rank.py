"""y += s·B·A·x in place, with factors of its own for every group of rows: two kernel launches for all adapters of a batch.

Punica (Chen et al. 2024, section 4) and S-LoRA (Sheng et al. 2024, section 5) multiply the rows of a batch by the factors of
their adapters in two kernels, one to the narrow rank ("shrink") and one back ("expand"). Here rows of one adapter share a tile,
so that its factors are read once a tile and tensor cores multiply, for single tokens and for prompts alike. A shrink has few
outputs, so its sum over inputs is divided among programs to keep the device busy, and the expand adds their shares up. Each kernel is
launched while the one before it still runs (Hopper's programmatic dependent launch) and waits inside for what that one writes:
they are so short that the time between two kernels counts.

N rows, I inputs, O outputs of P projections of one input, S slots, R rank (a power of two, 16 at least), W tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from luban.kernels.available import INTERPRETED
from luban.kernels.flash.tile import matmul
from luban.kernels.row_groups import FEWEST_ROWS, MANY_ROWS, RowGroups

# By rows of a tile: shares of a sum over inputs at most, inputs of a program at once, stages of their copies. The same for every
# forward with such tiles, so that sums are always divided alike.
SHRINKS = {FEWEST_ROWS: (8, 256, 2), MANY_ROWS: (2, 128, 3)}
BLOCK_OUTPUTS, BLOCK_RANK = 128, 64  # of a program at once; a rank that is larger takes several
PROJECTIONS = 3  # of one input at most


@triton.jit(do_not_specialize=["N"])
def shrink_kernel(
    X,
    A,
    SCALES,
    H,
    SLOTS,
    ROWS,
    N,
    x_row,
    a_slot,
    scales_slot,
    INPUTS: tl.constexpr,
    EACH: tl.constexpr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """s·A·x of one tile over EACH inputs, in float32: H (shares, N, RANKS). Grid (W, shares, RANKS / BLOCK_R)."""
    slot = tl.load(SLOTS + tl.program_id(0))
    rows = tl.load(ROWS + tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    if slot >= 0:
        inside = rows >= 0
        share = tl.program_id(1)
        at_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        factors = A + slot.to(tl.int64) * a_slot
        total = tl.zeros([M, BLOCK_R], tl.float32)
        if EARLY:
            gdc_wait()  # for the inputs
            gdc_launch_dependents()
        for start in range(share * EACH, share * EACH + EACH, BLOCK_I):
            at_i = start + tl.arange(0, BLOCK_I)
            x = tl.load(
                X + rows[:, None] * x_row + at_i[None, :], mask=inside[:, None] & (at_i[None, :] < INPUTS), other=0.0
            )
            a = tl.load(factors + at_r[None, :] * INPUTS + at_i[:, None], mask=at_i[:, None] < INPUTS, other=0.0)
            total += matmul(x, a, UPCAST)
        scale = tl.load(SCALES + slot * scales_slot + tl.program_id(2) * BLOCK_R // RANK)
        place = H + (share * N + rows[:, None]) * RANKS + at_r[None, :]
        tl.store(place, total * scale, mask=inside[:, None])


@triton.jit(do_not_specialize=["N"])
def expand_kernel(
    H,
    B,
    Y,
    SLOTS,
    ROWS,
    N,
    y_row,
    b_slot,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    SHARES: tl.constexpr,
    M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Y += H·Bᵀ for one tile and BLOCK_O outputs of one of up to three projections, of FIRST, SECOND and THIRD outputs.
    Grid (W, tiles of outputs)."""
    before_second: tl.constexpr = (FIRST + BLOCK_O - 1) // BLOCK_O
    before_third: tl.constexpr = before_second + (SECOND + BLOCK_O - 1) // BLOCK_O
    slot = tl.load(SLOTS + tl.program_id(0))
    rows = tl.load(ROWS + tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    if slot >= 0:
        inside = rows >= 0
        block = tl.program_id(1)
        second, third = (block >= before_second).to(tl.int32), (block >= before_third).to(tl.int32)
        projection = second + third
        begin = second * FIRST + third * SECOND
        end = FIRST + second * SECOND + third * THIRD
        block = block - second * before_second - third * (before_third - before_second)
        at_o = begin + block * BLOCK_O + tl.arange(0, BLOCK_O)
        there = at_o < end
        factors = B + slot.to(tl.int64) * b_slot
        place = Y + rows[:, None] * y_row + at_o[None, :]
        both = inside[:, None] & there[None, :]
        total = tl.zeros([M, BLOCK_O], tl.float32)
        for start in tl.static_range(0, RANK, BLOCK_R):  # type: ignore[not-iterable]
            at_r = start + tl.arange(0, BLOCK_R)
            b = tl.load(factors + at_o[None, :] * RANK + at_r[:, None], mask=there[None, :], other=0.0)
            if start == 0:
                if EARLY:
                    gdc_wait()  # for the outputs and what was shrunk; factors were there before
                total = tl.load(place, mask=both, other=0.0).to(tl.float32)
            h = tl.zeros([M, BLOCK_R], tl.float32)
            for share in tl.static_range(SHARES):  # type: ignore[not-iterable]
                narrow = H + (share * N + rows[:, None]) * RANKS + projection * RANK + at_r[None, :]
                h += tl.load(narrow, mask=inside[:, None], other=0.0)
            total += matmul(h.to(b.dtype), b, UPCAST)
        tl.store(place, total.to(Y.dtype.element_ty), mask=both)


def _early(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that begin while the one before them ends, where the GPU can."""
    if INTERPRETED or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}


def add_grouped_low_rank(
    y_NO: Tensor, x_NI: Tensor, a_SRI: Tensor, b_SOR: Tensor, scales_SP: Tensor, sizes: Sequence[int], groups: RowGroups
) -> None:
    """Add s·B·A·x to the outputs of every row that is in a tile, in place; no gradients.

    Args:
        y_NO: ΣO outputs of all projections, one after another in memory.
        a_SRI: (S, P·R, I), a slot's rows one after another. b_SOR: (S, ΣO, R). scales_SP: float32.
        sizes: outputs of each projection, three at most.
    """
    (N, inputs), projections = x_NI.shape, len(sizes)
    ranks, rank, (count, rows) = a_SRI.shape[1], b_SOR.shape[2], groups.rows.shape
    assert ranks == projections * rank and projections <= PROJECTIONS and x_NI.stride(1) == y_NO.stride(1) == 1
    block_r = min(rank, BLOCK_RANK)
    tiles_r = ranks // block_r
    most, block_i, stages = SHRINKS[rows]
    each = -(-inputs // (most * block_i)) * block_i
    shares = -(-inputs // each)
    h = torch.empty(shares, N, ranks, dtype=torch.float32, device=x_NI.device)
    launch: dict[str, Any] = {
        "RANKS": ranks,
        "RANK": rank,
        "M": rows,
        "BLOCK_R": block_r,
        **_early(x_NI.device),
        "UPCAST": INTERPRETED,
        "num_warps": 4,
    }
    shrink_kernel[(count, shares, tiles_r)](
        x_NI,
        a_SRI,
        scales_SP,
        h,
        groups.slots,
        groups.rows,
        N,
        x_NI.stride(0),
        a_SRI.stride(0),
        scales_SP.stride(0),
        **{"INPUTS": inputs, "EACH": each, "BLOCK_I": block_i, "num_stages": stages, **launch},
    )
    each_size = dict(zip(("FIRST", "SECOND", "THIRD"), [*sizes, 0, 0], strict=False))
    expand_kernel[(count, sum(-(-size // BLOCK_OUTPUTS) for size in sizes))](
        h,
        b_SOR,
        y_NO,
        groups.slots,
        groups.rows,
        N,
        y_NO.stride(0),
        b_SOR.stride(0),
        **{"SHARES": shares, "BLOCK_O": BLOCK_OUTPUTS, **each_size, **launch},
    )

"""FlashAttention as a differentiable function of torch tensors.

B batch, H query heads, K key heads (K divides H), T queries, S keys, D head width.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.kernels.distance import DistanceBias
from luban.kernels.flash import backward, forward
from luban.kernels.flash.tile import ALIBI, LOG, NONE, POWER, TABLE
from luban.kernels.intervals import Intervals, intervals, seeing_rows
from luban.kernels.layout import BlockLayout

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Tiles:
    """Block shapes and launch settings of one kernel."""

    rows: int  # BM, queries a tile
    cols: int  # BN, keys a tile
    warps: int
    stages: int


def tiles(width: int, which: str, sparse_block: int | None) -> Tiles:
    """Settings by head width, measured on an H100; a block-sparse layout fixes both sides to its block."""
    if INTERPRETED:
        table = {"forward": Tiles(32, 16, 4, 1), "keys": Tiles(16, 32, 4, 1), "queries": Tiles(32, 16, 4, 1)}
    elif width <= 64:
        table = {"forward": Tiles(128, 64, 4, 3), "keys": Tiles(64, 64, 4, 3), "queries": Tiles(128, 64, 4, 2)}
    elif width <= 128:
        table = {"forward": Tiles(128, 128, 8, 3), "keys": Tiles(64, 64, 4, 2), "queries": Tiles(128, 64, 8, 3)}
    else:
        table = {"forward": Tiles(64, 32, 4, 2), "keys": Tiles(32, 64, 4, 1), "queries": Tiles(64, 32, 4, 1)}
    chosen = table[which]
    return Tiles(sparse_block, sparse_block, chosen.warps, chosen.stages) if sparse_block else chosen


def flash_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, mask: Intervals | None = None,
                    bias: DistanceBias | None = None, layout: BlockLayout | None = None,
                    scale: float | None = None) -> Tensor:  # fmt: skip
    """softmax(q·kᵀ·scale + bias)·v over what each query sees, (B, H, T, D) in the inputs' dtype.

    Args:
        mask: what each query sees; none: causal. Needs start and stop that never decrease along T.
        bias: added to the scaled scores; gradients flow to its `parameters`.
        layout: block-sparse restriction on top of the mask.
        scale: 1/√D by default.

    Raises:
        UnsupportedError: shapes, dtypes or widths that the kernel can't serve.

    Source: Dao et al. 2022 (FlashAttention, algorithm 1, block-sparse section 3.3), Dao 2023 (loop order).
    """
    _check(q_BHTD, k_BKSD, v_BKSD)
    if mask is None:
        mask = intervals(q_BHTD.shape[2], k_BKSD.shape[2], device=q_BHTD.device)
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BKSD, v_BKSD))
    parameters = bias.parameters if bias else ()
    return _Flash.apply(q, k, v, mask, bias, layout, scale, *parameters)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UnsupportedError(f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
                               "don't fit (B, H, T, D) and (B, K, S, D)")  # fmt: skip
    if q.shape[1] % k.shape[1]:
        raise UnsupportedError(f"flash_attention: {k.shape[1]} key heads don't divide {q.shape[1]} query heads")
    if q.shape[2] > k.shape[2]:
        raise UnsupportedError(f"flash_attention: more queries ({q.shape[2]}) than keys ({k.shape[2]})")
    if q.shape[3] > 256:
        raise UnsupportedError(f"flash_attention: heads of width {q.shape[3]} are wider than 256")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"flash_attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; one of float32, bf16, fp16 needed"
        )


class _Flash(torch.autograd.Function):
    """Saves q, k, v, the output and the log-sum-exp; everything else is computed again."""

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, layout, scale, *parameters):
        out = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        call = _Call(q, k, mask, bias, layout, scale)
        t = tiles(q.shape[3], "forward", layout.block if layout else None)
        lists, counts = layout.by_query() if layout else (lse, lse)
        grid = (-(-q.shape[2] // t.rows), q.shape[0] * q.shape[1])
        forward.forward_kernel[grid](
            q, k, v, out, lse, mask.start, mask.stop, call.table, call.numbers, lists, counts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            call.interval_stride, call.table_stride, *call.list_strides(lists, counts),
            call.T, call.S, call.H, scale * LOG2E, call.zero, **call.constants(t),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (mask, bias, layout, scale)
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        mask, bias, layout, scale = ctx.rest
        do = do if do.stride(-1) == 1 else do.contiguous()
        call = _Call(q, k, mask, bias, layout, scale)
        delta = torch.empty_like(lse)
        grid = (-(-call.T // 64), q.shape[0] * call.H)
        backward.delta_kernel[grid](out, do, delta, *out.stride()[:3], *do.stride()[:3], call.T, call.H, DIM=call.dim,
                                    D=call.padded, BM=64)  # fmt: skip
        dk, dv = _keys_gradient(call, q, k, v, do, lse, delta, mask, layout, scale)
        dq, by_parameter = _queries_gradient(call, q, k, v, do, lse, delta, mask, bias, layout, scale)
        return dq, dk, dv, None, None, None, None, *by_parameter


class _Call:
    """What every launch of one attention needs to know."""

    def __init__(self, q: Tensor, k: Tensor, mask: Intervals, bias: DistanceBias | None, layout: BlockLayout | None,
                 scale: float):  # fmt: skip
        self.H, self.T, self.dim = q.shape[1:]
        self.S, self.group = k.shape[2], q.shape[1] // k.shape[1]
        self.padded = max(16, 1 << (self.dim - 1).bit_length())
        self.plain = mask.plain
        self.interval_stride = 0 if mask.start.shape[0] == 1 else mask.start.stride(0)
        self.kind = {"alibi": ALIBI, "power": POWER, "log": LOG, "buckets": TABLE}[bias.form] if bias else NONE
        self.table = (bias.table.detach() * LOG2E).contiguous() if self.kind == TABLE else q
        self.table_stride = self.table.stride(0) if self.kind == TABLE else 0
        self.numbers = _numbers(bias) if self.kind in (ALIBI, POWER, LOG) else q
        self.zero = bias.zero if bias else 0
        self.sparse = layout is not None
        self.exact = not mask.plain  # below the diagonal |i − j| is i − j, at least 1

    def list_strides(self, lists: Tensor, counts: Tensor) -> tuple[int, int, int]:
        """Strides of a layout's block lists; a layout of one head serves all."""
        if not self.sparse:
            return 0, 0, 0
        shared = lists.shape[0] == 1
        return (0 if shared else lists.stride(0)), lists.stride(1), (0 if shared else counts.stride(0))

    def constants(self, t: Tiles) -> dict:
        """Compile-time values of every kernel that walks tiles."""
        return {"GROUP": self.group, "DIM": self.dim, "D": self.padded, "BM": t.rows, "BN": t.cols, "BIAS": self.kind,
                "INTERVALS": not self.plain, "SPARSE": self.sparse, "EXACT": self.exact, "UPCAST": INTERPRETED,
                "num_warps": t.warps, "num_stages": t.stages}  # fmt: skip


def _numbers(bias: DistanceBias) -> Tensor:
    """(H, 2) what kernels multiply by, so that the bias comes out in base 2."""
    if bias.form == "alibi":
        return torch.stack([bias.parameters[0] * LOG2E] * 2, 1).float().contiguous()
    r1, r2 = (p.detach().float() for p in bias.parameters)
    return torch.stack([r1 * bias.scale * (LOG2E if bias.form == "power" else 1.0), r2], 1).contiguous()


def _learned(bias: DistanceBias, sums: Tensor) -> list[Tensor]:
    """Gradients of KERPLE's r1 and r2 from the sums that the kernel gathered, (H, 2)."""
    r1 = bias.parameters[0].detach()
    by_first, by_second = sums.unbind(1)
    if bias.form == "power":  # d/dr1 = −scale·Δ^r2, d/dr2 = −scale·r1·Δ^r2·ln Δ
        return [-bias.scale * by_first, -bias.scale * r1 * LN2 * by_second]
    return [-bias.scale * LN2 * by_first, -bias.scale * r1 * by_second]  # −scale·ln(1 + r2·Δ), −scale·r1·Δ/(1 + r2·Δ)


def _keys_gradient(call, q, k, v, do, lse, delta, mask, layout, scale):
    t = tiles(call.dim, "keys", layout.block if layout else None)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty_like(dk)
    seeing = seeing_rows(mask, t.cols, call.S) if not call.plain else mask.start
    lists, counts = layout.by_key() if layout else (lse, lse)
    backward.keys_kernel[(-(-call.S // t.cols), k.shape[0] * k.shape[1])](
        q, k, v, do, lse, delta, dk, dv, mask.start, mask.stop, seeing, call.table, call.numbers, lists, counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dk.stride()[:3],
        call.interval_stride, seeing.stride(0) if call.interval_stride else 0, call.table_stride,
        *call.list_strides(lists, counts), call.T, call.S, call.H, scale * LOG2E, scale, call.zero,
        **call.constants(t),
    )  # fmt: skip
    return dk, dv


def _queries_gradient(call, q, k, v, do, lse, delta, mask, bias, layout, scale):
    t = tiles(call.dim, "queries", layout.block if layout else None)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = -(-call.T // t.rows)
    learned = bias is not None and bias.form != "alibi" and any(p.requires_grad for p in bias.parameters)
    bucketed = learned and bias.buckets is not None
    width = bias.parameters[0].shape[1] if bucketed else 2
    grad = torch.zeros(q.shape[0], call.H, blocks, width, dtype=torch.float32, device=q.device)
    lists, counts = layout.by_query() if layout else (lse, lse)
    backward.queries_kernel[(blocks, q.shape[0] * call.H)](
        q, k, v, do, lse, delta, dq, mask.start, mask.stop, call.table, call.numbers,
        bias.buckets if bucketed else lse, grad, lists, counts,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
        call.interval_stride, call.table_stride, *call.list_strides(lists, counts),
        call.T, call.S, call.H, scale * LOG2E, scale, call.zero,
        MOMENTS=learned and not bucketed, BUCKETS=width if bucketed else 0, **call.constants(t),
    )  # fmt: skip
    if not learned:
        return dq, [None] * (len(bias.parameters) if bias else 0)
    summed = grad.sum((0, 2))
    return dq, [summed] if bucketed else _learned(bias, summed)

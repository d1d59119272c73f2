"""FlashAttention as a differentiable function of torch tensors.

B batch, H query heads, K key heads (K divides H), T queries, S keys, D head width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.kernels.distance import LOG2E, DistanceBias
from luban.kernels.flash import launch
from luban.kernels.intervals import Intervals, seeing_rows, work_items
from luban.kernels.layout import BlockLayout
from luban.kernels.limits import BLOCK_SIDES

WIDEST = 256  # D
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flash_attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    *,
    mask: Intervals | None = None,
    bias: DistanceBias | None = None,
    layout: BlockLayout | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v over what each query sees, (B, H, T, D) in the inputs' dtype.

    Args:
        mask: what each query sees; none: causal. Needs start and stop that never decrease along T. A query that sees
            nothing gets zeros.
        bias: added to the scaled scores; gradients flow to its `parameters`, except ALiBi's slopes.
        layout: block-sparse restriction on top of the mask.
        scale: 1/√D by default.

    Raises:
        UnsupportedError: shapes, dtypes or widths that the kernel can't serve.

    Source: Dao et al. 2022 (FlashAttention, algorithm 1, block-sparse section 3.3), Dao 2023 (loop order).
    """
    _check(q_BHTD, k_BKSD, v_BKSD)
    _check_what_is_seen(q_BHTD, k_BKSD.shape[2], mask, bias, layout)
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    D = q_BHTD.shape[-1]
    missing = -D % (16 // q_BHTD.element_size())  # places are fetched by 16 bytes
    q, k, v = (F.pad(x, (0, missing)) if missing else x for x in (q_BHTD, k_BKSD, v_BKSD))
    start = stop = seeing = items = None
    if mask is not None and not mask.plain:
        mask = prepared(mask, k.shape[2])
        start, stop, seeing, items = mask.start, mask.stop, mask.seeing, mask.items
    numbers = weight = table = buckets = None
    if bias is not None and bias.form == "buckets":
        weight, buckets, table = bias.parameters[0], bias.buckets, (bias.table().detach() * LOG2E).contiguous()
    elif bias is not None:
        numbers = bias.numbers()
        numbers = numbers.detach() if numbers is not None and bias.form == "alibi" else numbers
    lists = (None,) * 4
    if layout is not None:
        lists = layout.query_list, layout.query_count, layout.key_list, layout.key_count
    out, _ = launch.flash_forward(
        q,
        k,
        v,
        numbers,
        weight,
        table,
        buckets,
        start,
        stop,
        seeing,
        items,
        *lists,
        bias.form if bias else "none",
        bias.zero if bias else 0,
        bias.reach if bias else 0,
        layout.block if layout else 0,
        mask is None or mask.backward_only,
        float(scale),
    )
    return out[..., :D] if missing else out


def prepared(mask: Intervals, keys: int) -> Intervals:
    """The mask with what the backward pass over blocks of keys needs, and the order of the work; made once, it serves
    every layer."""
    if mask.plain or mask.seeing is not None:
        return mask
    seeing = seeing_rows(mask, keys)
    items = work_items(mask, seeing, launch.SIDE) if mask.start.shape[1] == keys else None
    return replace(mask, seeing=seeing, items=items)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UnsupportedError(
            f"flash_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
            "don't fit (B, H, T, D) and (B, K, S, D)"
        )
    if q.shape[1] % k.shape[1]:
        raise UnsupportedError(f"flash_attention: {k.shape[1]} key heads don't divide {q.shape[1]} query heads")
    if q.shape[2] > k.shape[2]:
        raise UnsupportedError(f"flash_attention: more queries ({q.shape[2]}) than keys ({k.shape[2]})")
    if q.shape[3] > WIDEST:
        raise UnsupportedError(f"flash_attention: heads of width {q.shape[3]} are wider than {WIDEST}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise UnsupportedError(
            f"flash_attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; one of float32, bf16, fp16 needed"
        )


def _check_what_is_seen(
    q: Tensor, keys: int, mask: Intervals | None, bias: DistanceBias | None, layout: BlockLayout | None
) -> None:
    B, H, T, D = q.shape
    if mask is not None and (mask.start.shape != mask.stop.shape or tuple(mask.start.shape) not in ((1, T), (B, T))):
        raise UnsupportedError(
            f"flash_attention: a mask of {tuple(mask.start.shape)} and {tuple(mask.stop.shape)} doesn't fit "
            f"{B} rows of {T} queries"
        )
    if bias is not None and bias.parameters[0].shape[0] != H:
        raise UnsupportedError(f"flash_attention: a bias of {bias.parameters[0].shape[0]} heads, and queries have {H}")
    if bias is not None and bias.form == "buckets" and bias.keys < keys:
        raise UnsupportedError(f"flash_attention: a bias for {bias.keys} keys, and there are {keys}")
    if layout is None:
        return
    if layout.block not in BLOCK_SIDES or (layout.block > 64 and D > 128):
        raise UnsupportedError(
            f"flash_attention: layouts have blocks of {', '.join(map(str, BLOCK_SIDES))} (128 for heads up to 128), "
            f"this one of {layout.block}, with heads of {D}"
        )
    blocks = -(-T // layout.block), -(-keys // layout.block)
    if keys != T or layout.table.shape[0] not in (1, H) or tuple(layout.table.shape[1:]) != blocks:
        raise UnsupportedError(
            f"flash_attention: a layout of {tuple(layout.table.shape)} blocks of {layout.block} doesn't "
            f"fit {H} heads, {T} queries and {keys} keys"
        )

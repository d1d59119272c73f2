"""FlashAttention-4 (the package flash-attn-4) as operators of torch, so that a compiler can hold it.

B batch, H query heads, K key heads, T queries, S keys, D head width; laid out (B, T, H, D) as the package wants it, or,
for documents in packed rows, the rows one after another: (B·T, H, D).
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature

import torch
from torch import Tensor


def load() -> None:
    """Import the package; raise where its functions don't take what they are given below, as those of another version."""
    package, lists = import_module("flash_attn.cute.interface"), _lists(None, None)
    signature(package._flash_attn_fwd).bind(*[None] * 3, softmax_scale=1.0, causal=True, return_lse=True, **lists)
    signature(package._flash_attn_bwd).bind(*[None] * 6, 1.0, True, **lists)


def attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, scale: float) -> Tensor:
    """(B, H, T, D) mixed values; bf16 or fp16 on a Hopper GPU or later."""
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BKSD, v_BKSD))
    out, _ = flash4_forward(q, k, v, None, None, causal, scale)
    return out.transpose(1, 2)


def packed_attention(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, edges: Tensor, scale: float) -> Tensor:
    """(B, H, T, D) mixed values, causal inside each document.

    Args:
        edges: (documents + 1,) int32, never decreasing, from 0 to B·T: where the documents of all rows, one row after
            another, begin, and where the last ends. Documents of no tokens may lie between.
    """
    B, _, T, _ = q_BHTD.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BKTD, v_BKTD))  # views of what projections give
    out, _ = flash4_forward(q, k, v, edges, T, True, scale)
    return out.unflatten(0, (B, T)).transpose(1, 2)


def _lists(edges: Tensor | None, longest: int | None) -> dict[str, Tensor | int | None]:
    """The package's names for a list of documents; none: (B, T, H, D) tensors of whole rows."""
    return {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}


def _forward(q, k, v, edges, longest, causal, scale):
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    found = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_lists(edges, longest))
    return found[0], found[1]


def _backward(do, q, k, v, out, lse, edges, longest, causal, scale):
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    found = _flash_attn_bwd(q, k, v, out, do.contiguous(), lse, scale, causal, **_lists(edges, longest))
    return found[0], found[1], found[2]


flash4_forward = torch.library.custom_op(
    "luban::flash4_forward",
    _forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? edges, int? longest, bool causal, float scale) -> (Tensor, Tensor)",
)
flash4_backward = torch.library.custom_op(
    "luban::flash4_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? edges, int? longest, bool causal,"
    " float scale) -> (Tensor, Tensor, Tensor)",
)


@flash4_forward.register_fake
def _(q, k, v, edges, longest, causal, scale):
    *rows, H, _ = q.shape
    lse = (H, *rows) if edges is not None else (rows[0], H, rows[1])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@flash4_backward.register_fake
def _(do, q, k, v, out, lse, edges, longest, causal, scale):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, edges, ctx.longest, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, edges)


def _differentiate(ctx, do, _):
    gradients = flash4_backward(do, *ctx.saved_tensors, ctx.longest, ctx.causal, ctx.scale)
    return *gradients, None, None, None, None


flash4_forward.register_autograd(_differentiate, setup_context=_save)

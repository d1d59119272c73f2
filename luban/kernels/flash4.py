"""FlashAttention-4 (the package flash-attn-4) as operators of torch, so that a compiler can hold it.

B batch, H query heads, K key heads, T queries, S keys, D head width; laid out (B, T, H, D) as the package wants it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, causal: bool, scale: float) -> Tensor:
    """(B, H, T, D) mixed values; bf16 or fp16 on a Hopper GPU or later."""
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BKSD, v_BKSD))
    out, _ = flash4_forward(q, k, v, causal, scale)
    return out.transpose(1, 2)


def _forward(q, k, v, causal, scale):
    from flash_attn.cute.interface import _flash_attn_fwd

    found = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    return found[0], found[1]


def _backward(do, q, k, v, out, lse, causal, scale):
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(q, k, v, out, do.contiguous(), lse, scale, causal)[:3]
    return dq, dk, dv


flash4_forward = torch.library.custom_op(
    "luban::flash4_forward", _forward, mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor, Tensor)",
)  # fmt: skip
flash4_backward = torch.library.custom_op(
    "luban::flash4_backward", _backward, mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, float scale)"
           " -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@flash4_forward.register_fake
def _(q, k, v, causal, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@flash4_backward.register_fake
def _(do, q, k, v, out, lse, causal, scale):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx, do, _):
    return (*flash4_backward(do, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None)


flash4_forward.register_autograd(_differentiate, setup_context=_save)

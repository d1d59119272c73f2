"""Rotary positions on the output of one matmul that holds queries, keys and values side by side.

B batch, T tokens, H query heads, K key heads, D head width (Su et al. 2021, RoFormer, equation 34; pairs (i, i + D/2)).
One pass reads the matmul and writes queries, keys and values where attention wants them; one pass back gathers their
gradients into the matmul's. The rotation's gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_part(
    source,
    target,
    at,
    cos,
    sin,
    source_head,
    target_head,
    heads,
    head0,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    TURN: tl.constexpr,
):
    """Copy GROUP heads of one token from source to target, with rotation if TURN."""
    head = head0 + tl.arange(0, GROUP)[:, None]
    inside = head < heads
    first = tl.load(source + head * source_head + at, mask=inside).to(tl.float32)
    second = tl.load(source + head * source_head + HALF + at, mask=inside).to(tl.float32)
    if TURN:
        first, second = first * cos - second * sin, second * cos + first * sin
    kind = target.dtype.element_ty
    tl.store(target + head * target_head + at, first.to(kind), mask=inside)
    tl.store(target + head * target_head + HALF + at, second.to(kind), mask=inside)


@triton.jit(do_not_specialize=["length"])  # it changes from step to step where text is generated
def rotate_kernel(
    packed,
    q,
    k,
    v,
    cos,
    sin,
    length,
    batched,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    H: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BACK: tl.constexpr,
):
    """One token: split packed into q, k, v and rotate q, k; BACK: inverse rotation of their gradients into the packed one."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // length, row % length
    at = tl.arange(0, HALF)[None, :]
    table = (token + tl.where(batched != 0, batch * length, 0)) * 2 * HALF
    c = tl.load(cos + table + at)
    s = tl.load(sin + table + HALF + at)
    s = -s if BACK else s
    D: tl.constexpr = 2 * HALF
    base = packed + row * (H + 2 * K) * D
    q_at, k_at, v_at = (
        q + batch * q_batch + token * q_token,
        k + batch * k_batch + token * k_token,
        v + batch * v_batch + token * v_token,
    )
    for head in tl.static_range(0, H, GROUP):
        if BACK:
            _rotate_part(q_at, base, at, c, s, q_head, D, H, head, HALF, GROUP, True)
        else:
            _rotate_part(base, q_at, at, c, s, D, q_head, H, head, HALF, GROUP, True)
    for head in tl.static_range(0, K, GROUP):
        if BACK:
            _rotate_part(k_at, base + H * D, at, c, s, k_head, D, K, head, HALF, GROUP, True)
            _rotate_part(v_at, base + (H + K) * D, at, c, s, v_head, D, K, head, HALF, GROUP, False)
        else:
            _rotate_part(base + H * D, k_at, at, c, s, D, k_head, K, head, HALF, GROUP, True)
            _rotate_part(base + (H + K) * D, v_at, at, c, s, D, v_head, K, head, HALF, GROUP, False)


def _launch(packed: Tensor, parts: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, back: bool) -> None:
    q, k, v = parts
    B, H, T, D = q.shape
    strides = [stride for part in parts for stride in part.stride()[:3]]
    rotate_kernel[(B * T,)](
        packed,
        q,
        k,
        v,
        cos,
        sin,
        T,
        int(cos.shape[0] > 1),
        *strides,
        H=H,
        K=k.shape[1],
        HALF=D // 2,
        GROUP=8,
        BACK=back,
        num_warps=4,
    )


@torch.library.custom_op("luban::apply_rotary_qkv", mutates_args=())
def apply_rotary_qkv(
    packed_BTP: Tensor, cos: Tensor, sin: Tensor, heads: int, key_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (B, T, (H + 2K)·D), contiguous → queries (B, H, T, D), keys and values (B, K, T, D), with queries
    and keys rotated.

    Args:
        cos, sin: (1 or B, 1, T, D) fp32 tables as `luban.nn.position.rope.rotary_cos_sin` makes them, in halves.

    The results lie in memory token by token, (B, T, H, D).
    """
    q, k, v = _like(packed_BTP, heads, key_heads)
    _launch(packed_BTP, (q, k, v), cos, sin, back=False)
    return q, k, v


def _like(packed_BTP: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, P = packed_BTP.shape
    D = P // (heads + 2 * key_heads)
    q, k, v = (packed_BTP.new_empty(B, T, count, D).transpose(1, 2) for count in (heads, key_heads, key_heads))
    return q, k, v


@torch.library.custom_op("luban::apply_rotary_qkv_backward", mutates_args=())
def apply_rotary_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of the three → of what they came from, (B, T, (H + 2K)·D)."""
    B, H, T, D = dq.shape
    packed = dq.new_empty(B, T, (H + 2 * dk.shape[1]) * D)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
    _launch(packed, (q, k, v), cos, sin, back=True)
    return packed


@apply_rotary_qkv.register_fake
def _(packed_BTP, cos, sin, heads, key_heads):
    return _like(packed_BTP, heads, key_heads)


@apply_rotary_qkv_backward.register_fake
def _(dq, dk, dv, cos, sin):
    B, H, T, D = dq.shape
    return dq.new_empty(B, T, (H + 2 * dk.shape[1]) * D)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _differentiate(ctx, dq, dk, dv):
    return apply_rotary_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


apply_rotary_qkv.register_autograd(_differentiate, setup_context=_save)

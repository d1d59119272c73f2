"""softmax(q·kᵀ/√D + mask)·v by the kernel that was chosen.

B batch, H query heads, K key heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from luban.kernels.limits import LARGEST_SQUARE, query_chunk
from luban.nn.attention.prepared_mask import PreparedMask

# Torch falls through to the next where the first can't serve a case after all.
FIRST = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
REST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: PreparedMask, scale: float | None = None) -> Tensor:
    """(B, H, T, D) mixed values; K must divide H; `scale` stands for 1/√D where given."""
    factor: float = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    if mask.kernel == "torch":
        return _torch(q_BHTD, k_BKSD, v_BKSD, mask, factor)
    q_BHTD, k_BKSD = (x.to(v_BKSD.dtype) for x in (q_BHTD, k_BKSD))
    if mask.kernel == "luban":
        from luban.kernels.flash.attention import flash_attention

        mixed = flash_attention(
            q_BHTD, k_BKSD, v_BKSD, mask=mask.intervals, bias=mask.bias, layout=mask.layout, scale=factor
        )
        return mixed if mask.valid is None else (mixed * mask.valid).to(mixed.dtype)
    if mask.kernel == "flash4":
        from luban.kernels import flash4

        if mask.cu_seqlens is not None:
            return flash4.packed_attention(q_BHTD, k_BKSD, v_BKSD, mask.cu_seqlens, factor)
        return flash4.attention(q_BHTD, k_BKSD, v_BKSD, mask.causal, factor)
    first = FIRST[mask.kernel]
    with sdpa_kernel([first, *(kernel for kernel in REST if kernel != first)], set_priority=True):
        return _torch(q_BHTD, k_BKSD, v_BKSD, mask, factor)


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask, scale: float) -> Tensor:
    """Torch's own choice of kernel. On the CPU its kernel for half precision takes 2.2× as long forward and 4.3× backward
    as that for fp32 (16 × 8 heads × 256 × 32, AVX-512 without AMX) and rounds more: such inputs are computed in fp32, and
    short bf16 rows in training by matmuls written out, which a compiler fuses with what lies between them."""
    grouped, kind, dense = q.shape[1] != k.shape[1], q.dtype, mask.dense
    if q.device.type == "cpu" and kind in (torch.bfloat16, torch.float16):
        if _keeps_scores(q, k):
            return _written_out(q, k, v, mask, scale)
        q, k, v = q.float(), k.float(), v.float()
        dense = None if dense is None else dense.float()
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense, is_causal=mask.causal, enable_gqa=grouped, scale=scale
    )
    return mixed.to(kind)


def _keeps_scores(q: Tensor, k: Tensor) -> bool:
    """True in a compiled bf16 training step with rows short enough to save their scores."""
    training = torch.compiler.is_compiling() and torch.is_grad_enabled() and q.dtype == torch.bfloat16
    return training and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= LARGEST_SQUARE


def _written_out(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: PreparedMask, scale: float) -> Tensor:
    """softmax(q·kᵀ·scale + mask)·v with bf16 matmuls and an fp32 softmax, some queries at a time, so that keys which
    none of them may see cost nothing. 3.7× as fast as the fp32 kernel, forward and backward together (16 × 4 heads × 256 ×
    64, 2 key heads, two cores with AVX512-BF16)."""
    (B, H, T, D), (K, S) = q_BHTD.shape, k_BKSD.shape[1:3]
    dense = mask.dense
    if mask.causal:
        slots = torch.arange(T, device=q_BHTD.device)
        dense = torch.where(slots[:, None] >= slots, 0.0, float("-inf"))[None, None]
    if dense is not None:
        dense = dense.unflatten(1, (K, H // K)) if dense.shape[1] == H else dense.unsqueeze(1)  # (B, K, H / K, T, S)
    size, mixed = query_chunk(T), []
    for start in range(0, T, size):
        stop = min(start + size, T)
        seen = stop if mask.backward_only else S
        q_BKRD = q_BHTD[:, :, start:stop].reshape(B, K, -1, D)  # R rows: the queries of a group's heads
        raw = (q_BKRD @ k_BKSD[:, :, :seen].mT).view(B, K, H // K, stop - start, seen).float() * scale
        weights = (raw if dense is None else raw + dense[..., start:stop, :seen]).softmax(-1).to(q_BHTD.dtype)
        mixed.append((weights.view(B, K, -1, seen) @ v_BKSD[:, :, :seen]).view(B, H, stop - start, D))
    return torch.cat(mixed, 2)

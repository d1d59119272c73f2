"""softmax(q·kᵀ/√D + mask)·v by the kernel that was chosen.

B batch, H query heads, K key heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from luban.nn.attention.mask import Scores

# Torch falls through to the next where the first can't serve a case after all.
FIRST = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
REST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scores: Scores, scale: float | None = None) -> Tensor:
    """(B, H, T, D) mixed values; K must divide H; `scale` stands for 1/√D where given."""
    scale = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
    if scores.path == "torch":
        return _torch(q_BHTD, k_BKSD, v_BKSD, scores, scale)
    q_BHTD, k_BKSD = (x.to(v_BKSD.dtype) for x in (q_BHTD, k_BKSD))
    if scores.path == "luban":
        from luban.kernels.flash.attention import flash_attention

        mixed = flash_attention(q_BHTD, k_BKSD, v_BKSD, mask=scores.seen, bias=scores.bias, scale=scale)
        return mixed if scores.sound is None else (mixed * scores.sound).to(mixed.dtype)
    if scores.path == "flash4":
        from luban.kernels import flash4

        return flash4.attention(q_BHTD, k_BKSD, v_BKSD, scores.causal, scale)
    first = FIRST[scores.path]
    with sdpa_kernel([first, *(kernel for kernel in REST if kernel != first)], set_priority=True):
        return _torch(q_BHTD, k_BKSD, v_BKSD, scores, scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, scores: Scores, scale: float) -> Tensor:
    """Torch's own choice of kernel. On the CPU half-precision inputs are computed in fp32: its half-precision kernel
    there took 2.2× as long forward and 4.3× backward (16 × 8 heads × 256 × 32, AVX-512 without AMX), and rounds more.
    """
    grouped, kind, mask = q.shape[1] != k.shape[1], q.dtype, scores.mask
    if q.device.type == "cpu" and kind in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
        mask = None if mask is None else mask.float()
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=scores.causal, enable_gqa=grouped, scale=scale
    )
    return mixed.to(kind)

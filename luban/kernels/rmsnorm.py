"""RMSNorm in one pass, for inference (Zhang & Sennrich 2019). Training leaves it to the compiler, which fuses it with what
is around it.

N rows, E width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16_384  # E that a program holds


@triton.jit
def rms_norm_kernel(X, WEIGHT, OUT, x_row, width, eps, BLOCK: tl.constexpr):
    """One row; the normalised row is rounded before it is scaled, as in `luban.nn.norm.RMSNormModule`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(X + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    kind = OUT.dtype.element_ty
    normal = (x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)).to(kind)
    weight = tl.load(WEIGHT + at, mask=inside, other=0.0).to(kind)
    tl.store(OUT + row * width + at, normal * weight, mask=inside)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis, (…, E) → the same shape and dtype, contiguous; without gradients."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    warps = min(8, max(1, block // 512))
    if len(rows):
        rms_norm_kernel[(len(rows),)](rows, weight_E, out, rows.stride(0), width, eps, BLOCK=block, num_warps=warps)  # type: ignore[call-arg]
    return out

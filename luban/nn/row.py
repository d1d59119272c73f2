"""A row or a few times a matrix: what decoding consists of, on a CPU in float32 and on a GPU (`luban.kernels.gemv`).

I inputs, O outputs. On a CPU the product is a sum of the matrix's I rows, each weighted by one input, which is what an embedding
bag with weights computes; FBGEMM's kernel for it prefetches and reads at the memory's full speed, where BLAS's
matrix–vector product reaches two thirds (EPYC, one thread or two). Several bags, one a thread, are summed at the end.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.kernels.available import infers_fused

HAS_KERNEL = "fbgemm" in torch.backends.quantized.supported_engines
SMALLEST_BAG = 128  # inputs a bag at least


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, I), (O, I), (O,) → (…, O): torch's matmul, but for one row in inference on a CPU, or a few on a GPU."""
    if is_row(x, weight):
        return row_linear(x, weight, bias)
    if infers_fused(x) and type(weight) in (Tensor, nn.Parameter):
        from luban.kernels.gemv import gemv, serves

        if serves(x, weight):
            return gemv(x, weight, bias)
    return F.linear(x, weight, bias)


def is_row(x: Tensor, weight: Tensor) -> bool:
    """True for one float32 row on a CPU, without gradients, and a column-major matrix."""
    return (
        HAS_KERNEL
        and weight.dtype == torch.float32
        and weight.stride() == (1, weight.shape[0])
        and x.numel() == weight.shape[1]
        and infers_row(x)
    )


def infers_row(x: Tensor) -> bool:
    """True for one float32 row on a CPU, without gradients."""
    return (
        not torch.is_grad_enabled()
        and x.numel() == x.shape[-1]
        and x.dtype == torch.float32
        and x.is_cpu
        and not torch.compiler.is_compiling()
    )


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, I) of one row, (O, I) column-major, (O,) → (…, O)."""
    outputs, inputs = weight.shape
    bags, indices, offsets = _bags(inputs, torch.get_num_threads())
    out = torch.embedding_bag(weight.t(), indices, offsets, False, 0, False, x.reshape(-1))[0]
    out = out.sum(0) if bags > 1 else out
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], outputs)


def row_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight of one row (…, E), by fewer operations than torch's, each of which costs as much as the
    row's arithmetic."""
    row = x.reshape(-1)
    squares = torch.dot(row, row).item() / row.shape[0]
    return torch.mul(x, weight).mul_((squares + eps) ** -0.5)


@lru_cache(maxsize=64)
def _bags(inputs: int, threads: int) -> tuple[int, Tensor, Tensor]:
    """Number of bags, indices of all inputs, and where in them each bag begins."""
    with torch.inference_mode(False):
        count = max(1, min(threads, inputs // SMALLEST_BAG))
        return count, torch.arange(inputs), torch.arange(count) * (inputs // count)

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
        not torch.is_grad_enabled()
        and HAS_KERNEL
        and x.device.type == "cpu"
        and x.numel() == weight.shape[1]
        and x.dtype == weight.dtype == torch.float32
        and weight.stride() == (1, weight.shape[0])
        and not torch.compiler.is_compiling()
    )


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, I) of one row, (O, I) column-major, (O,) → (…, O)."""
    indices, offsets = _bags(weight.shape[1], torch.get_num_threads())
    out = torch.embedding_bag(weight.t(), indices, offsets, False, 0, False, x.reshape(-1))[0]
    out = out.sum(0) if len(offsets) > 1 else out
    out = out if bias is None else out + bias
    return out.view(*x.shape[:-1], -1)


@lru_cache(maxsize=64)
def _bags(inputs: int, threads: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        count = max(1, min(threads, inputs // SMALLEST_BAG))
        return torch.arange(inputs), torch.arange(count) * (inputs // count)

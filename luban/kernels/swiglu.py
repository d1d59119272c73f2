"""silu(gate) · up on the output of one product that holds both side by side, and its gradient in one pass.

N rows, I inner width. The gradient's pass also gives the forward's output again, for the price of writing it: what is
needed for the gradient of the weights behind it need then not be kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.kernels.product import added_product

BLOCK = 2048


@triton.jit
def forward_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside).to(tl.float32)
    tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(gate_up, d_out, d_gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one row: both gradients, and the output again."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside).to(tl.float32)
    d = tl.load(d_out + row * width + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = out.dtype.element_ty
    tl.store(out + row * width + at, (silu * up).to(kind), mask=inside)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(d_gate_up + row * 2 * width + at, (d * up * slope).to(kind), mask=inside)
    tl.store(d_gate_up + row * 2 * width + width + at, (d * silu).to(kind), mask=inside)


@torch.library.custom_op("luban::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """(N, 2I) contiguous, gates first → (N, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    forward_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return out


@torch.library.custom_op("luban::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, the forward's output) from both, contiguous."""
    rows, width = d_out.shape
    d_gate_up, out = torch.empty_like(gate_up), torch.empty_like(d_out)
    grid = (rows, triton.cdiv(width, BLOCK))
    backward_kernel[grid](gate_up, d_out, d_gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return d_gate_up, out


@swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@swiglu_backward.register_fake
def _(gate_up, d_out):
    return torch.empty_like(gate_up), torch.empty_like(d_out)


class SwigluProduct(torch.autograd.Function):
    """onto + (silu(gate) · up)·weightᵀ for gate_up (N, 2I) and weight (O, I) → (N, O); keeps these two alone."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
        """(N, O); `onto` (N, O) may be left out."""
        ctx.save_for_backward(gate_up, weight)
        ctx.onto = onto is not None
        inner = swiglu(gate_up)
        return inner @ weight.t() if onto is None else added_product(onto, inner, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of all three."""
        gate_up, weight = ctx.saved_tensors
        d_gate_up, inner = swiglu_backward(gate_up, (dy @ weight).contiguous())
        return d_gate_up, dy.t() @ inner, dy if ctx.onto else None

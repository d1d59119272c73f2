"""silu(gate) · up on the output of one matmul that holds both side by side, and its gradient in one pass.

N rows, I inner width. The gradient's pass can also give the forward's output again, for the price of writing it: it
need then not be kept for the gradient of the weights behind it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def load_pair(gate_up, row, width, at, inside):
    """Gates and ups of a row, in fp32."""
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def gradients(gate, up, d):
    """silu(gate) · up again, and the gradients of both from that of it."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * silu


@triton.jit
def forward_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = load_pair(gate_up, row, width, at, inside)
    tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(gate_up, d_out, d_gate_up, out, width, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one row: both gradients, and AGAIN the output."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate, up = load_pair(gate_up, row, width, at, inside)
    d = tl.load(d_out + row * width + at, mask=inside).to(tl.float32)
    inner, d_gate, d_up = gradients(gate, up, d)
    kind = out.dtype.element_ty
    if AGAIN:
        tl.store(out + row * width + at, inner.to(kind), mask=inside)
    tl.store(d_gate_up + row * 2 * width + at, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up + row * 2 * width + width + at, d_up.to(kind), mask=inside)


@torch.library.custom_op("luban::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """(N, 2I) contiguous, gates first → (N, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    forward_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up, out, width, BLOCK=BLOCK, num_warps=4)
    return out


@torch.library.custom_op("luban::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: Tensor, d_out: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate_up, the forward's output or nothing) from both, contiguous; `again`: whether to make it."""
    rows, width = d_out.shape
    d_gate_up, out = torch.empty_like(gate_up), d_out.new_empty(d_out.shape if again else 0)
    grid = (rows, triton.cdiv(width, BLOCK))
    backward_kernel[grid](gate_up, d_out, d_gate_up, out, width, AGAIN=again, BLOCK=BLOCK, num_warps=4)
    return d_gate_up, out


@swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@swiglu_backward.register_fake
def _(gate_up, d_out, again):
    return torch.empty_like(gate_up), d_out.new_empty(d_out.shape if again else 0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx, d_out):
    return swiglu_backward(ctx.saved_tensors[0], d_out.contiguous(), False)[0]


swiglu.register_autograd(_differentiate, setup_context=_save)


class _SwigluLinear(torch.autograd.Function):
    """Keeps gate_up and weight alone: the inner activation is computed again together with its gradient."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        """(N, O)."""
        ctx.save_for_backward(gate_up, weight)
        return swiglu(gate_up) @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of both, or of gate_up alone."""
        gate_up, weight = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        d_gate_up, inner = swiglu_backward(gate_up, (dy @ weight).contiguous(), of_weight)
        return d_gate_up, dy.t() @ inner if of_weight else None


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate_up)·weightᵀ for gate_up (N, 2I) and weight (O, I) → (N, O)."""
    return _SwigluLinear.apply(gate_up, weight)

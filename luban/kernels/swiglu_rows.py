"""SwiGLU and its gradient with their results in 8-bit floating point beside, every row by its own scale, in one pass.

N rows, I inner width: a program has a row, whose largest value it must know before it rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.kernels.swiglu import gradients, load_pair


@triton.jit
def forward_kernel(gate_up, out, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One row of silu(gate) · up in 8 bits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gate, up = load_pair(gate_up, row, width, at, inside)
    inner = gate * tl.sigmoid(gate) * up
    scale = tl.maximum(tl.max(tl.abs(inner), 0), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    tl.store(out + row * width + at, (inner / scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    gate_up, d_out, d_gate_up, rounded, scales, inner, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of both gradients, as they are and in 8 bits, and the forward's output."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gate, up = load_pair(gate_up, row, width, at, inside)
    d = tl.load(d_out + row * width + at, mask=inside, other=0.0).to(tl.float32)
    activated, d_gate, d_up = gradients(gate, up, d)
    tl.store(inner + row * width + at, activated.to(inner.dtype.element_ty), mask=inside)
    scale = tl.maximum(tl.maximum(tl.max(tl.abs(d_gate), 0), tl.max(tl.abs(d_up), 0)), 1e-12) / LARGEST
    tl.store(scales + row, scale)
    left, right = row * 2 * width + at, row * 2 * width + width + at
    tl.store(d_gate_up + left, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + right, d_up.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(rounded + left, (d_gate / scale).to(rounded.dtype.element_ty), mask=inside)
    tl.store(rounded + right, (d_up / scale).to(rounded.dtype.element_ty), mask=inside)


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@torch.library.custom_op("luban::swiglu_rows", mutates_args=())
def swiglu_rows(gate_up: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, 2I) contiguous, gates first → ((N, I) in `kind`, (N, 1) fp32 scales)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, scales = _empty(gate_up, width, kind)
    forward_kernel[(rows,)](gate_up, out, scales, width, LARGEST=torch.finfo(kind).max, **_launch(width))
    return out, scales


@torch.library.custom_op("luban::swiglu_rows_backward", mutates_args=())
def swiglu_rows_backward(gate_up: Tensor, d_out: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate_up (N, 2I) and the gradient (N, I), contiguous → the gradient of gate_up, the same in `kind` with its (N, 1)
    scales, and the forward's output (N, I) as it is."""
    rows, width = d_out.shape
    d_gate_up, inner = torch.empty_like(gate_up), torch.empty_like(d_out)
    rounded, scales = _empty(gate_up, 2 * width, kind)
    backward_kernel[(rows,)](
        gate_up, d_out, d_gate_up, rounded, scales, inner, width, LARGEST=torch.finfo(kind).max, **_launch(width)
    )
    return d_gate_up, rounded, scales, inner


def _empty(like: Tensor, width: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = like.shape[0]
    return like.new_empty(rows, width, dtype=kind), like.new_empty(rows, 1, dtype=torch.float32)


@swiglu_rows.register_fake
def _(gate_up, kind):
    return _empty(gate_up, gate_up.shape[1] // 2, kind)


@swiglu_rows_backward.register_fake
def _(gate_up, d_out, kind):
    return torch.empty_like(gate_up), *_empty(gate_up, gate_up.shape[1], kind), torch.empty_like(d_out)

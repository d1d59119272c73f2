"""Cross-entropy of a linear layer's outputs without all logits ever standing in memory.

N rows, E width of the hidden states, V vocabulary (or one rank's slice of it).

Logits are made for a bounded number of rows, turned into their own gradients in place, and multiplied on at once into
the gradients of rows and weight: what is kept for the backward pass is those two, whatever V. The two kernels are apart
so that ranks which share the vocabulary can combine the first one's results before the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.kernels.limits import IGNORED, LOGIT_BYTES

BLOCK = 4096  # vocabulary entries a program holds


@triton.jit
def statistics_kernel(logits, targets, lse, picked, total, stride, vocabulary, first, BLOCK: tl.constexpr):
    """One row: log-sum-exp, the target's logit (0 where the target lies elsewhere), the sum of all logits."""
    row = tl.program_id(0).to(tl.int64)
    highest, summed, plain = float("-inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        x = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(x, 0))
        summed = summed * tl.exp(highest - above) + tl.sum(tl.exp(x - above), 0)
        highest = above
        plain += tl.sum(tl.where(inside, x, 0.0), 0)
    tl.store(lse + row, highest + tl.log(summed))
    tl.store(total + row, plain)
    place = tl.load(targets + row) - first
    here = (place >= 0) & (place < vocabulary)
    tl.store(picked + row, tl.load(logits + row * stride + place, mask=here, other=0.0).to(tl.float32))


@triton.jit
def gradient_kernel(logits, targets, lse, stride, vocabulary, whole, first, smoothing, z_loss, BLOCK: tl.constexpr):
    """A block of one row: the logits become the gradient of the row's loss with respect to them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    target = tl.load(targets + row)
    normaliser = tl.load(lse + row)
    x = tl.load(logits + row * stride + columns, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - normaliser) * (1.0 + 2.0 * z_loss * normaliser) - smoothing / whole
    gradient -= tl.where(columns == target - first, 1.0 - smoothing, 0.0)
    gradient = tl.where(target == -100, 0.0, gradient)
    tl.store(logits + row * stride + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def times_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    """out = x · factor."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    product = tl.load(x + at, mask=inside).to(tl.float32) * tl.load(factor)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("luban::times", mutates_args=())
def times(x: Tensor, factor: Tensor) -> Tensor:
    """A contiguous tensor times an fp32 scalar on its device, in fp32 at the speed of reading: torch's own product
    of two precisions takes six times as long."""
    out = torch.empty_like(x)
    if x.numel():
        times_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=8)
    return out


@times.register_fake
def _(x, factor):
    return torch.empty_like(x)


def row_statistics(logits_NV: Tensor, targets_N: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, target's logit, sum of logits), each (N,) fp32; `first` is the id of the first column."""
    lse, picked, total = (torch.empty(logits_NV.shape[0], device=logits_NV.device) for _ in range(3))
    statistics_kernel[(logits_NV.shape[0],)](
        logits_NV,
        targets_N,
        lse,
        picked,
        total,
        logits_NV.stride(0),
        logits_NV.shape[1],
        first,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return lse, picked, total


def to_gradient_(
    logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, *, smoothing: float, z_loss: float, whole: int, first: int = 0
) -> None:
    """Turn logits into the gradient of the summed loss in place; `whole` is the size of the whole vocabulary."""
    rows, vocabulary = logits_NV.shape
    gradient_kernel[(rows, triton.cdiv(vocabulary, BLOCK))](
        logits_NV,
        targets_N,
        lse_N,
        logits_NV.stride(0),
        vocabulary,
        whole,
        first,
        smoothing,
        z_loss,
        BLOCK=BLOCK,
        num_warps=8,
    )


@torch.library.custom_op("luban::linear_cross_entropy", mutates_args=())
def _forward(
    rows_NE: Tensor,
    weight_VE: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    smoothing: float,
    z_loss: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vocabulary = weight_VE.shape[0]
    size = max(1, LOGIT_BYTES // (vocabulary * rows_NE.element_size()))
    loss = torch.zeros((), device=rows_NE.device)
    d_rows = torch.empty_like(rows_NE) if gradients else rows_NE.new_empty(0)
    d_weight = torch.zeros(weight_VE.shape if gradients else (0,), device=rows_NE.device)
    d_bias = torch.zeros(vocabulary if gradients and bias_V is not None else 0, device=rows_NE.device)
    for start in range(0, rows_NE.shape[0], size):
        here = slice(start, start + size)
        rows, targets = rows_NE[here], targets_N[here]
        logits = rows @ weight_VE.t() if bias_V is None else torch.addmm(bias_V, rows, weight_VE.t())
        lse, picked, total = row_statistics(logits, targets)
        picked = torch.where((targets >= vocabulary) | (targets < 0), float("nan"), picked)  # IGNORED is left out below
        each = lse - (1 - smoothing) * picked - smoothing / vocabulary * total + z_loss * lse.square()
        loss += torch.where(targets == IGNORED, 0.0, each).sum()
        if gradients:
            to_gradient_(logits, targets, lse, smoothing=smoothing, z_loss=z_loss, whole=vocabulary)
            torch.mm(logits, weight_VE, out=d_rows[here])
            _add_product_(d_weight, logits.t(), rows)
            if bias_V is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
    bias_type = rows_NE.dtype if bias_V is None else bias_V.dtype
    return loss, d_rows, d_weight.to(weight_VE.dtype), d_bias.to(bias_type)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b in fp32, from whatever precision; on a GPU without a pass of its own."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


@_forward.register_fake
def _(rows_NE, weight_VE, bias_V, targets_N, smoothing, z_loss, gradients):
    kept = (lambda like: torch.empty_like(like)) if gradients else (lambda like: like.new_empty(0))
    bias = kept(bias_V) if bias_V is not None else rows_NE.new_empty(0)
    return rows_NE.new_empty((), dtype=torch.float32), kept(rows_NE), kept(weight_VE), bias


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.biased = inputs[2] is not None


def _backward(ctx, d_loss, *_):
    d_rows, d_weight, d_bias = (times(gradient, d_loss) for gradient in ctx.saved_tensors)
    return d_rows, d_weight, d_bias if ctx.biased else None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)


def linear_cross_entropy(
    rows_NE: Tensor,
    weight_VE: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Summed cross-entropy in nats of rows·weightᵀ (+ bias) against targets, a scalar in fp32.

    Args:
        rows_NE, weight_VE, bias_V: in one precision; logits are rounded to it, their sums are fp32.
        targets_N: int64 below V; -100 counts nothing. Any other id makes the loss NaN, as checking it would need a synchronization.
        smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7), 0 to 1.
        z_loss: factor on log²Z (Chowdhery et al. 2022, section 5).

    Raises:
        UnsupportedError: shapes that don't fit each other, or a share that is none.

    The gradients are made in the forward pass, and their product with the loss's own gradient is all that is left.
    """
    _check(rows_NE, weight_VE, targets_N, bias_V, smoothing)
    learned = [x for x in (rows_NE, weight_VE, bias_V) if x is not None and x.requires_grad]
    needed = torch.is_grad_enabled() and bool(learned)
    return _forward(rows_NE.contiguous(), weight_VE, bias_V, targets_N, smoothing, z_loss, needed)[0]


def _check(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, smoothing: float) -> None:
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1] or targets.shape != rows.shape[:1]:
        raise UnsupportedError(
            f"linear_cross_entropy: rows {tuple(rows.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} don't fit (N, E), (V, E) and (N,)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UnsupportedError(
            f"linear_cross_entropy: a bias of {tuple(bias.shape)} for {weight.shape[0]} vocabulary entries"
        )
    if not 0 <= smoothing <= 1:
        raise UnsupportedError(f"linear_cross_entropy: smoothing is a share from 0 to 1, {smoothing} given")

"""One AdamW update of one tensor in a single pass: moments, decay, clipping, rounding, half-precision copy.

Loshchilov & Hutter 2019, algorithm 2. What would otherwise be passes of their own is folded in: the gradient's factor
(clipping, loss scale) is read from the device, so that no host waits for it, and so is the switch that leaves all
untouched after a bad step. Values kept in bf16 are rounded stochastically (Gupta et al. 2015, section 3.2: the
expectation of what is stored is what was computed), or small updates would be lost.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _mixed(x):
    """A well mixed 32-bit hash of every element (the finaliser of MurmurHash3): noise for rounding, cheaper than Philox."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _store(pointer, at, inside, value, noise, KEEP: tl.constexpr):
    """Store fp32 values: as they are, or in bf16 rounded up with the probability that the cut-off part says."""
    if KEEP:
        tl.store(pointer + at, value, mask=inside)
    else:
        bits = value.to(tl.uint32, bitcast=True) + (noise & 0xFFFF)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        tl.store(pointer + at, tl.where(value == value, rounded, value).to(tl.bfloat16), mask=inside)


@triton.jit
def _correction(step, log_beta):
    """1 − βᵗ from t and ln β, exact also where βᵗ is close to 1."""
    x = step * log_beta
    return tl.where(x > -0.01, -x * (1 + x / 2 * (1 + x / 3)), 1 - tl.exp(x))


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(weight, copy, gradient, first, second, steps, scale, go, size, lr, decay, beta1, beta2, log_beta1,
                 log_beta2, eps, seed, HAS_COPY: tl.constexpr, WIDE_WEIGHT: tl.constexpr, WIDE_MOMENTS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """A block of one tensor."""
    if tl.load(go) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    step = tl.load(steps)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = tl.sqrt(v / _correction(step, log_beta2)) + eps
    w = w * (1 - lr * decay) - lr * (m / _correction(step, log_beta1)) / root
    noise = _mixed(at.to(tl.uint32) + _mixed(seed.to(tl.uint32) + _mixed(step.to(tl.uint32))))
    _store(weight, at, inside, w, noise, WIDE_WEIGHT)
    _store(first, at, inside, m, noise >> 16, WIDE_MOMENTS)
    _store(second, at, inside, v, _mixed(noise + 1), WIDE_MOMENTS)
    if HAS_COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), mask=inside)


def adamw_(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, steps: Tensor, *, scale: Tensor, go: Tensor,
           lr: float, decay: float, betas: tuple[float, float], eps: float, seed: int,
           copy: Tensor | None = None) -> None:  # fmt: skip
    """Update `weight` and its moments in place, and write the rounded weight to `copy`.

    Args:
        weight, first, second: contiguous; weight fp32 or bf16, the moments fp32 or bf16.
        gradient: contiguous, any floating type.
        steps: scalar fp32 on the device: how many updates there were, this one included.
        scale: scalar fp32 on the device: factor on the gradient. go: scalar; where it is 0 nothing happens.
        seed: of the rounding, different for every tensor; with `steps` it draws different noise every step.
    """
    size = weight.numel()
    adamw_kernel[(triton.cdiv(size, BLOCK),)](
        weight, weight if copy is None else copy, gradient, first, second, steps, scale, go, size,
        float(lr), float(decay), float(betas[0]), float(betas[1]), math.log(betas[0]) if betas[0] else -1e30,
        math.log(betas[1]) if betas[1] else -1e30, float(eps), seed,
        HAS_COPY=copy is not None, WIDE_WEIGHT=weight.dtype == torch.float32,
        WIDE_MOMENTS=first.dtype == torch.float32, BLOCK=BLOCK, num_warps=8)  # fmt: skip

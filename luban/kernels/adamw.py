"""One AdamW update of many tensors in a single pass and launch: moments, decay, clipping, rounding, half-precision copy.

Loshchilov & Hutter 2019, algorithm 2. What would otherwise be passes of their own is folded in: the gradient's factor
(clipping, loss scale) is read from the device, so that no host waits for it, and so is the switch that leaves all
untouched after a bad step. Values kept in bf16 are rounded stochastically (Gupta et al. 2015, section 3.2: the
expectation of what is stored is what was computed), or small updates would be lost.

A launch costs the host more time than most tensors cost the device. So all tensors of one kind share one: a table holds
their addresses, and each program looks up whose block it has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from luban.kernels.stepped import Stepped

BLOCK = 2048
ALIGNED = 16  # bytes, and elements: what wide loads and stores need
COLUMNS = 8  # of the table: six addresses, the number of elements, the seed
KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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


@triton.jit
def _address(row, column: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr):
    """One of a tensor's addresses in the table, as a pointer."""
    pointer = tl.load(row + column).to(tl.pointer_type(KIND))
    if EVEN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw_kernel(
    table,
    firsts,
    owners,
    scale,
    apply,
    lr,
    decay,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    EVEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one of the tensors: that of the table's row owners[program], whose blocks begin with program
    firsts[row]."""
    if tl.load(apply) == 0:
        return
    owner = tl.load(owners + tl.program_id(0))
    block = (tl.program_id(0) - tl.load(firsts + owner)).to(tl.int64)
    row = table + owner * COLUMNS
    weight, gradient = _address(row, 0, WEIGHT, EVEN), _address(row, 1, GRADIENT, EVEN)
    first, second = _address(row, 2, MOMENT, EVEN), _address(row, 3, MOMENT, EVEN)
    size, seed = tl.load(row + 6), tl.load(row + 7)
    if EVEN:
        size = tl.multiple_of(size, 16)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    step = tl.load(_address(row, 4, tl.float32, False))
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    m = tl.load(first + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = tl.sqrt(v / _correction(step, log_beta2)) + eps
    w = w * (1 - lr * decay) - lr * (m / _correction(step, log_beta1)) / root
    noise = _mixed(at.to(tl.uint32) + _mixed(seed.to(tl.uint32) + _mixed(step.to(tl.uint32))))
    _store(weight, at, inside, w, noise, tl.float32 == WEIGHT)
    _store(first, at, inside, m, noise >> 16, tl.float32 == MOMENT)
    _store(second, at, inside, v, _mixed(noise + 1), tl.float32 == MOMENT)
    if HAS_COPY:
        copy = _address(row, 5, COPY, EVEN)
        tl.store(copy + at, w.to(COPY), mask=inside)


def adamw_(
    tensors: Sequence[Stepped],
    *,
    scale: Tensor,
    apply: Tensor,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update weights and their moments in place, and write the rounded weights to their copies.

    Args:
        tensors: all on one device.
        scale: scalar fp32 on the device: factor on the gradients. apply: scalar; where it is 0 nothing happens.
    """
    kinds: dict[tuple, list[Stepped]] = {}
    for each in tensors:
        if each.weight.numel():
            kinds.setdefault(_kind(each), []).append(each)
    for (weight, gradient, moment, copy, even), alike in kinds.items():
        table, firsts, owners = _table(alike, scale.device)
        adamw_kernel[(len(owners),)](
            table,
            firsts,
            owners,
            scale,
            apply,
            float(lr),
            float(decay),
            float(betas[0]),
            float(betas[1]),
            math.log(betas[0]) if betas[0] else -1e30,
            math.log(betas[1]) if betas[1] else -1e30,
            float(eps),
            WEIGHT=KINDS[weight],
            GRADIENT=KINDS[gradient],
            MOMENT=KINDS[moment],
            COPY=KINDS[copy or weight],
            HAS_COPY=copy is not None,
            EVEN=even,
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            num_warps=8,
        )


def _kind(each: Stepped) -> tuple:
    """Properties shared by the tensors of one launch: dtypes, and whether wide loads are safe."""
    wide = [x for x in (each.weight, each.gradient, each.first, each.second, each.copy) if x is not None]
    even = all(x.data_ptr() % ALIGNED == 0 for x in wide) and each.weight.numel() % ALIGNED == 0
    return each.weight.dtype, each.gradient.dtype, each.first.dtype, getattr(each.copy, "dtype", None), even


def _table(alike: Sequence[Stepped], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(tensors, COLUMNS) int64 addresses, sizes and seeds; where each tensor's programs begin; which tensor each has."""
    rows = [
        [
            *(x.data_ptr() for x in (t.weight, t.gradient, t.first, t.second, t.steps)),
            0 if t.copy is None else t.copy.data_ptr(),
            t.weight.numel(),
            t.seed,
        ]
        for t in alike
    ]
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return table, *_programs(tuple(row[6] for row in rows), device)


@lru_cache(maxsize=16)
def _programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensors,) the first program of each tensor, and (programs,) the tensor of each, int32."""
    counts = [triton.cdiv(size, BLOCK) for size in sizes]
    firsts = torch.tensor([0, *itertools.accumulate(counts[:-1])], dtype=torch.int32)
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts))
    return firsts.to(device), owners.to(device)

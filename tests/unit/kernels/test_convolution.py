"""Long and short convolutions against their definitions, token by token and document by document."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luban.kernels.convolution import convolution_flops, document_groups, long_convolution, short_convolution


def direct(z, h, documents=None):
    """The sum written out, (B, C, T)."""
    T = z.shape[-1]
    at = torch.arange(T)
    distance = at[:, None] - at
    taps = torch.where(distance >= 0, h[:, distance.clamp_min(0)], 0.0)  # (C, T, T)
    if documents is None:
        return torch.einsum("cts,bcs->bct", taps, z)
    same = documents[:, :, None] == documents[:, None, :]
    return torch.einsum("cts,bts,bcs->bct", taps, same.to(z.dtype), z)


def packed(rows, tokens, most=6):
    return torch.sort(torch.randint(0, random.randint(1, most), (rows, tokens)), 1).values


@pytest.mark.parametrize("documents", [False, True])
def test_by_fft_is_the_sum_written_out(documents):
    B, C, T = random.randint(1, 3), random.randint(1, 5), random.randint(1, 90)
    z, h = torch.randn(B, C, T), torch.randn(C, T + random.randint(0, 5)) / T**0.5
    docs = packed(B, T) if documents else None
    torch.testing.assert_close(long_convolution(z, h, docs), direct(z, h, docs), atol=1e-5, rtol=0)
    half = long_convolution(z.bfloat16(), h, docs)
    assert half.dtype == torch.bfloat16  # 8 bits of each of T terms whose squares sum to about 1
    torch.testing.assert_close(half.float(), direct(z, h, docs), atol=0.1, rtol=0)


@pytest.mark.parametrize("documents", [False, True])
def test_gradients_are_those_of_the_sum(documents):
    B, C, T = 2, 3, random.randint(2, 40)
    z, h = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((B, C, T), (C, T + 2)))
    docs = packed(B, T) if documents else None
    dy = torch.randn(B, C, T, dtype=torch.float64)
    found = torch.autograd.grad(long_convolution(z, h, docs), (z, h), dy)
    for ours, theirs in zip(found, torch.autograd.grad(direct(z, h, docs), (z, h), dy), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_documents_of_similar_length_go_together_with_little_padding():
    tokens = 500
    docs = packed(2, tokens, most=60)
    seen = torch.zeros(2 * tokens, dtype=torch.long)
    for places, real in document_groups(docs):
        assert real.numel() <= 2 * int(real.sum())
        assert all(len(docs.flatten()[row[keep]].unique()) == 1 for row, keep in zip(places, real, strict=True))
        seen.index_add_(0, places[real], torch.ones_like(places[real]))
    assert (seen == 1).all()


@pytest.mark.parametrize("documents", [False, True])
def test_short_convolutions_are_the_sum_written_out(documents):
    B, C, T, K = 2, 3, random.randint(1, 20), random.randint(1, 5)
    x, taps = torch.randn(B, T, C), torch.randn(C, K)
    docs = packed(B, T) if documents else None
    padded = torch.nn.functional.pad(taps, (0, max(T - K, 0)))
    wanted = direct(x.mT, padded[:, : max(T, K)], docs).mT
    torch.testing.assert_close(short_convolution(x, taps, docs), wanted, atol=1e-5, rtol=0)


class Transforms(TorchDispatchMode):
    """Counts the FLOPs of the real transforms that are called, 2.5·n·log₂ n each, and of products of spectra."""

    flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::_fft_r2c", "aten::_fft_c2r"):
            n = args[0].shape[-1] if name.endswith("r2c") else out.shape[-1]
            self.flops += 2.5 * n * math.log2(n) * (out.numel() // out.shape[-1])
        elif name == "aten::mul" and out.is_complex():
            self.flops += 6 * out.numel()
        return out


def test_flops_are_those_of_the_transforms_that_run():
    B, C, T = (random.randint(1, 9) for _ in range(3))
    with Transforms() as counted:
        size = 2 * T
        torch.fft.irfft(
            torch.fft.rfft(torch.randn(B, C, T), n=size) * torch.fft.rfft(torch.randn(C, T), n=size), n=size
        )
    assert convolution_flops(B, C, T) == pytest.approx(counted.flops, rel=1e-3, abs=3 * B * C)


def test_filters_shorter_than_the_row_are_refused():
    with pytest.raises(ValueError, match="filters of 4 values can't convolve rows of 5 tokens"):
        long_convolution(torch.randn(1, 2, 5), torch.randn(2, 4))

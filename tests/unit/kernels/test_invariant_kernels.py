"""Kernels of batch-invariant inference: right against torch, and a row's bits the same whatever else is there."""

from __future__ import annotations

import pytest
import torch
from drawn import drawn
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted

from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged_invariant import InvariantPagedAttention
from luban.nn.attention.paged_layer import PagedLayer
from luban.nn.mixer.base import AttentionShape

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.skipif(HERE, reason="the tests below run here")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


@here
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_the_fixed_matmul(dtype):
    from luban.kernels.fixed_matmul import fixed_matmul

    for rows, inputs, outputs in ((70, 96, 130), (3, 33, 20), *([(600, 2048, 5632)] if ON_GPU else [])):
        x, weight, bias = (
            torch.randn(*s, device=DEVICE).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,))
        )
        whole = fixed_matmul(x, weight, bias)
        expected = x.double() @ weight.double().t() + bias.double()
        rounding = torch.finfo(dtype).eps * expected.abs() + 1e-5 * inputs**0.5  # of the result, and of the sum in fp32
        assert ((whole.double() - expected).abs() <= rounding).all()
        for some in ([0], [rows - 1], torch.randperm(rows)[: rows // 2].tolist()):
            assert torch.equal(fixed_matmul(x[some], weight, bias), whole[some])
        column_major = weight.t().contiguous().t()
        assert torch.equal(fixed_matmul(x, column_major, bias), whole)


@here
@pytest.mark.parametrize("kernel", ["luban", "torch"])
@pytest.mark.parametrize("dtype", drawn(DTYPES, 1))
def test_a_token_attends_alike_in_any_chunk_and_batch(dtype, kernel):
    """A sequence read whole, in parts and token by token, beside others or alone."""
    heads, key_heads, width, length, size = 4, 2, 16, 90, 16
    shape = AttentionShape(heads, key_heads, width)
    q, k, v = (torch.randn(1, h, length, width, device=DEVICE).to(dtype) for h in (heads, key_heads, key_heads))
    blocks = -(-length // size)

    def read(parts: list[int], beside: int) -> torch.Tensor:
        """(H, length, D), `beside` other tokens in every forward."""
        layer = PagedLayer((blocks + 2) * size, shape, torch.device(DEVICE), dtype)
        layer.keys.zero_(), layer.values.zero_()
        mixed, start = [], 0
        for count in parts:
            at = torch.arange(start, start + count, device=DEVICE)
            others = torch.arange(beside, device=DEVICE)
            slots = torch.cat((others + blocks * size, at))
            tables = torch.stack((torch.full((blocks,), blocks), torch.arange(blocks))).int().to(DEVICE)
            starts, counts = ((0, start), (beside, count)) if beside else ((start,), (count,))
            tokens = PackedTokens(torch.cat((others, at)), slots, tables[-len(counts) :], starts, counts, size)
            backend = InvariantPagedAttention([layer], tokens, kernel)
            mask = backend._prepared(q.device, shape, None, dtype)
            noise = [torch.randn(1, x.shape[1], beside, width, device=DEVICE).to(dtype) for x in (q, k, v)]
            new = [torch.cat((a, x[:, :, start : start + count]), 2) for a, x in zip(noise, (q, k, v), strict=True)]
            mixed.append(backend.attend(*new, mask, layer, None)[0, :, beside:])
            start += count
        return torch.cat(mixed, 1)

    whole = read([length], 0)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )[0]
    torch.testing.assert_close(whole.double(), dense, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    for parts, beside in (([40, 1, 1, 30, 18], 0), ([17, 73], 5), ([85, *[1] * 5], 3)):
        assert torch.equal(read(parts, beside), whole)

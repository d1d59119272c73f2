"""One row times a matrix, and matrices laid for it, against float64 and against torch's product."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F

import luban
from luban.load.export import parameters
from luban.models.spec import uniform
from luban.nn import row
from luban.nn.linear import store_column_major
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm

kernel = pytest.mark.skipif(not row.HAS_KERNEL, reason="FBGEMM is not in this torch")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@kernel
@torch.no_grad()
def test_a_row_is_as_exact_as_torchs_product(threads):
    inputs, outputs = random.randrange(1, 900), random.randrange(1, 3000)
    weight = torch.randn(inputs, outputs).t()
    x, bias = torch.randn(1, 1, inputs), torch.randn(outputs)
    assert row.is_row(x, weight)
    out = row.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    assert out.shape == (1, 1, outputs)
    assert ((out - exact).abs() <= size * inputs * torch.finfo(torch.float32).eps).all()


def test_more_rows_gradients_and_other_precisions_take_torchs_product():
    weight = torch.randn(24, 40).t()
    one, two = torch.randn(1, 24), torch.randn(2, 24)
    assert not row.is_row(one, weight)  # gradients
    with torch.no_grad():
        assert not row.is_row(two, weight)
        assert not row.is_row(one.double(), weight.double())
        assert torch.equal(row.linear(two, weight), F.linear(two, weight))


def test_a_laid_model_trains_as_a_plain_one():
    """Fused optimizers run over a parameter's memory as it lies, so a matrix mustn't share its block with another."""
    plain = luban.build_model(uniform(vocab_size=50, width=32, layers=1), seed=1)
    laid = copy.deepcopy(plain)
    store_column_major(laid)
    tokens = torch.randint(0, 50, (2, 9))
    for model in (plain, laid):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    for ours, theirs in zip(laid.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_laid_model_decodes_what_a_plain_one_does(bias):
    spec = uniform(
        vocab_size=211,
        width=160,
        layers=2,
        tied_head=bias,
        mixer=Grouped(heads=4, kv_heads=2, qkv_bias=bias, qk_norm=RMSNorm() if bias else None),
    )
    plain = luban.build_model(spec, seed=5).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    laid = copy.deepcopy(plain)
    store_column_major(laid)
    tokens = torch.randint(0, 211, (1, 1))
    torch.testing.assert_close(laid(tokens), plain(tokens), atol=1e-4, rtol=1e-4)
    for (name, ours), theirs in zip(parameters(laid).items(), parameters(plain).values(), strict=True):
        assert ours.is_contiguous() and torch.equal(ours, theirs), name


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_norm_of_a_row_is_as_exact_as_torchs(scale):
    width = random.randrange(1, 900)
    x, weight = torch.randn(1, 1, width) * scale, torch.randn(width)
    assert row.infers_row(x) and not row.infers_row(torch.randn(2, width)) and not row.infers_row(x.bfloat16())
    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(row.row_rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5, atol=1e-7)
    module = RMSNorm(eps=1e-5).build(width)
    module.weight.copy_(weight)
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_row_that_is_not_finite_gives_no_finite_norm():
    for bad in (float("nan"), float("inf")):
        x = torch.randn(1, 1, 16)
        x[..., random.randrange(16)] = bad
        assert not row.row_rms_norm(x, torch.ones(16), 1e-5).isfinite().all()

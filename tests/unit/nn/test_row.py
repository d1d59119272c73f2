"""One row times a matrix, laid for it and joined with its neighbours, against float64 and against torch's product."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F

import luban
from luban.load.export import parameters
from luban.nn import row
from luban.nn.attention.grouped import Grouped
from luban.nn.linear import Dense, lay_by_inputs, parallel
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
    assert row.is_row(x, weight) and row.by_inputs(weight)
    out = row.multiply(x, weight, bias)
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
        assert torch.equal(row.multiply(two, weight), F.linear(two, weight))


@torch.no_grad()
def test_layers_laid_together_keep_their_values_and_are_read_as_one(monkeypatch):
    class Three(torch.nn.Module):
        joined = ("a", "b", "c")

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Dense(130, 7), Dense(130, 300), Dense(130, 1)

    module = Three()
    plain = copy.deepcopy(module)
    lay_by_inputs(module)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert row.side_by_side((module.a.weight, module.b.weight, module.c.weight)).shape == (308, 130)
    assert row.side_by_side((module.b.weight, module.a.weight)) is None
    calls = []
    product = row.multiply_row
    monkeypatch.setattr("luban.nn.linear.multiply_row", lambda *args: calls.append(1) or product(*args))
    for x in (torch.randn(1, 1, 130), torch.randn(2, 3, 130)):
        for ours, theirs in zip(parallel(x, *module.children()), parallel(x, *plain.children()), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(calls) == int(row.HAS_KERNEL)
    module.b.weight.data = torch.zeros(300, 130)  # moved away: no longer read together, and never from the old place
    assert parallel(torch.randn(1, 130), *module.children())[1].equal(module.b.bias[None])
    module.a.weight.mul_(2)  # in place it stays
    torch.testing.assert_close(module.a.weight, plain.a.weight * 2)


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_laid_model_decodes_what_a_plain_one_does(bias):
    spec = luban.ModelSpec(vocab_size=211, width=160, layers=2, tied_head=bias,
                           attention=Grouped(heads=4, kv_heads=2, qkv_bias=bias, qk_norm=RMSNorm() if bias else None))  # fmt: skip
    plain = luban.build_model(spec, seed=5).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    laid = copy.deepcopy(plain)
    lay_by_inputs(laid)
    tokens = torch.randint(0, 211, (1, 1))
    torch.testing.assert_close(laid(tokens), plain(tokens), atol=1e-4, rtol=1e-4)
    for (name, ours), theirs in zip(parameters(laid).items(), parameters(plain).values(), strict=True):
        assert ours.is_contiguous() and torch.equal(ours, theirs), name

"""Matmuls in 8 bits against float64: errors of the size that three mantissa bits allow, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from counted import MatmulCount
from torch import nn
from torch.utils.checkpoint import checkpoint

from luban.core.errors import UnsupportedError
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.float8 import E4M3, FLOAT8, by_rows, require_float8, use_float8
from luban.nn.linear import matmul_owners
from luban.nn.mixer.grouped import Grouped


def test_every_row_has_a_scale_of_its_own():
    x = torch.randn(7, 64) * 10.0 ** torch.randint(-6, 6, (7, 1))
    values, scale = by_rows(x)
    assert values.dtype == E4M3 and scale.shape == (7, 1)
    back = values.float() * scale
    largest = x.abs().amax(1, keepdim=True)
    assert ((back - x).abs() <= x.abs() * 2.0**-4 + largest * 1e-4).all()
    torch.testing.assert_close(back.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert not by_rows(torch.zeros(2, 16))[0].float().any()


def test_product_and_gradients_are_near_and_the_weights_gradient_is_not_rounded():
    x, w = torch.randn(5, 8, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    y = FLOAT8.linear(x, w, bias)
    do = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, bias), do)
    right = nn.functional.linear(x, w, bias)
    wanted = torch.autograd.grad(right, (x, w, bias), do)
    for ours, theirs, limit in ((y, right, 0.04), (dx, wanted[0], 0.04), (dw, wanted[1], 1e-5), (db, wanted[2], 1e-5)):
        assert (ours - theirs).norm() / theirs.norm() < limit
    assert (y - right).norm() > 0  # it is rounded


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_no_product(frozen):
    values = torch.randn(8, 64), torch.randn(32, 64)
    leaves = [x.requires_grad_(i != frozen) for i, x in enumerate(values)]
    y = FLOAT8.linear(*leaves)
    with MatmulCount() as counted:
        y.backward(torch.randn_like(y))
    assert counted.count == 1
    assert leaves[frozen].grad is None and leaves[1 - frozen].grad.shape == leaves[1 - frozen].shape


@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_product_is_the_uncompiled_one_and_keeps_no_more(recompute):
    torch._dynamo.reset()
    values, do, results, kept = (
        (torch.randn(8, 64), torch.randn(48, 64), torch.randn(16, 48)),
        torch.randn(8, 16),
        [],
        [],
    )

    def two(x, first, second):
        return FLOAT8.linear(FLOAT8.linear(x, first).tanh(), second)

    def function(*leaves):
        return checkpoint(two, *leaves, use_reentrant=False) if recompute else two(*leaves)

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    for each in (function, torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)):
        kept.clear()
        leaves = [x.detach().requires_grad_() for x in values]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = each(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, do)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert ((8, 48) not in kept) == recompute  # of the compiled one


def test_layers_of_the_blocks_take_part_but_not_embedding_and_head(capsys):
    module = build_model(uniform(vocab_size=48, width=32, layers=2), seed=0)
    taken = use_float8(module.decoder.blocks)
    owners = [owner for _, owner in matmul_owners(module.decoder.blocks)]
    assert taken == len(owners) == 2 * 3 and sum(len(owner.projections()) for owner in owners) == 2 * 7
    assert all(owner.matmul is FLOAT8 for owner in owners) and module.head.matmul is not FLOAT8
    odd = build_model(uniform(vocab_size=48, width=40, layers=1, mixer=Grouped(heads=2)), seed=0)
    use_float8(odd.decoder.blocks)
    assert "multiples of 16" in capsys.readouterr().err


def test_a_processor_without_it_is_told():
    with pytest.raises(UnsupportedError, match=r"capability 8\.9.*--train.precision bf16"):
        require_float8(torch.device("cpu"))

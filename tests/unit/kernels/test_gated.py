"""Matmuls that end in SwiGLU, with plain ones in the place of quack-kernels': what is asked of them, what becomes of it."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from counted import MatmulCount
from torch.library import opcheck

from luban.kernels import available, gated
from luban.kernels.reference.swiglu import swiglu_of_pairs
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.models.stack import blocks_of
from luban.nn.feedforward import gated as network
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.parallel.remat import remat_policy

N, E, INNER, OUT = 7, 16, 48, 32


def gemm_gated(A, B, C=None, activation=None, config=None):
    assert activation == "swiglu" and C is None and A.is_contiguous() and config["tile_m"] == 192
    return A @ B, swiglu_of_pairs(A @ B)


def gemm_dgated(A, B, PreAct, activation=None, config=None):
    assert activation == "swiglu" and A.is_contiguous() and config["tile_m"] == 128
    d, gate, up = A @ B, PreAct[:, 0::2], PreAct[:, 1::2]
    sigmoid = gate.sigmoid()
    d_gate, d_up = d * up * sigmoid * (1 + gate * (1 - sigmoid)), d * gate * sigmoid
    return torch.stack([d_gate, d_up], 2).flatten(1), swiglu_of_pairs(PreAct)


@pytest.fixture
def quack(monkeypatch):
    """The package's modules, and nothing known of them."""
    names = ("quack", "quack.gemm_interface", "quack.gemm_config", "quack.epilogue", "quack.epilogue.library")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    modules = sys.modules[names[1]], sys.modules[names[2]]
    modules[0].gemm_gated, modules[0].gemm_dgated, modules[1].GemmConfig = gemm_gated, gemm_dgated, dict
    monkeypatch.setattr(available, "find_spec", lambda name: name)
    gated.missing.cache_clear()
    yield modules
    gated.missing.cache_clear()


def drawn(rows: int = N) -> list[torch.Tensor]:
    """x, gate, up and down in float64."""
    shapes = (rows, E), (INNER, E), (INNER, E), (OUT, INNER)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def ours(x, gate, up, down):
    return gated.gated_matmuls(x, gated.paired(gate, up), down)[0]


def plain(x, gate, up, down):
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [N, 1, 0])
def test_values_and_gradients_are_those_of_plain_matmuls(quack, rows, compiled):
    torch._dynamo.reset()
    function = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else ours
    values, dy = drawn(rows), torch.randn(OUT, rows, dtype=torch.float64).t()
    values[0] = values[0].t().contiguous().t()  # inputs by inputs, as no product of the package is asked to take them
    results = []
    for of in (function, plain):
        leaves = [x.detach().requires_grad_() for x in values]
        out = of(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dy)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (0, 3), (0, 1), (1, 2), (3,), (0, 1, 2, 3)])
def test_what_is_frozen_costs_no_product(quack, wanted, compiled):
    torch._dynamo.reset()
    function = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else ours
    values, dy, results = drawn(), torch.randn(N, OUT, dtype=torch.float64), []
    for of in (function, plain):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(values)]
        out = of(*leaves)
        with MatmulCount() as counted:
            gradients = torch.autograd.grad(out, [leaves[i] for i in wanted], dy)
        results.append([out, *gradients])
        if of is function:
            assert counted.count == len({(0, 1, 1, 2)[i] for i in wanted})  # gate and up have one
    torch.testing.assert_close(*results)


def test_the_operators_are_what_they_say_they_are(quack):
    x, gate, up, down = drawn()
    weight, tests = gated.paired(gate, up), ("test_schema", "test_faketensor")
    opcheck(gated.gated_matmuls, (x, weight, down), test_utils=tests)
    gate_up = gated.gated_matmuls(x, weight, down)[1]
    opcheck(gated.gated_matmuls_backward, (torch.randn(N, OUT, dtype=torch.float64), down, gate_up), test_utils=tests)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_rematerialisation_repeats_the_matmuls_only_where_it_should(quack, monkeypatch, remat, times, compiled):
    torch._dynamo.reset()
    spec = uniform(vocab_size=31, width=32, layers=2, mixer=Grouped(heads=2), feedforward=SwiGLU(width=48))
    model, calls, tokens = build_model(spec, seed=random.randrange(1000)), [], torch.randint(0, 31, (2, 24))
    monkeypatch.setattr(
        quack[0], "gemm_gated", lambda A, B, **options: (calls.append(A.shape), gemm_gated(A, B, **options))[1]
    )

    def gradients():
        loss = model(tokens, output="hidden").square().mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    right = gradients()
    monkeypatch.setattr(network, "multiplies_joined", lambda *_: True)
    monkeypatch.setattr(gated, "serves", torch.compiler.assume_constant_result(lambda *_: True))
    for block in blocks_of(model):
        block.use_remat(remat_policy(remat, block))
        if compiled:
            block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(), right, rtol=1e-4, atol=1e-6)
    assert calls == [(48, 32)] * 2 * times


def test_it_serves_half_precision_on_hopper_alone(quack, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    half, other = random.sample([torch.bfloat16, torch.float16], 2)
    monkeypatch.setattr(gated, "_served", set())
    assert not gated.serves("cuda", half, half, E, INNER + 1, OUT) and not gated.report()
    assert gated.picked("cuda", half, half, E, INNER, OUT) and "SwiGLU inside its matmuls" in gated.report()[0]
    assert not gated.serves("cpu", half, half, E, INNER, OUT)
    assert not gated.serves("cuda", half, other, E, INNER, OUT) and not gated.serves(
        torch.float32, torch.float32, E, INNER, OUT
    )
    assert not any(gated.serves("cuda", half, half, E, INNER + rest, OUT) for rest in range(1, 16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: random.choice([(8, 9), (10, 0), (12, 0)]))
    assert not gated.serves("cuda", half, half, E, INNER, OUT)


def without_config(A, B, C=None, activation=None):
    raise AssertionError("called")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda gemm, config: setattr(gemm, "gemm_gated", without_config), "config"),
        (lambda gemm, config: setattr(gemm, "gemm_dgated", without_config), "argument"),
        (lambda gemm, config: delattr(gemm, "gemm_dgated"), "gemm_dgated"),
        (lambda gemm, config: setattr(config, "GemmConfig", lambda tile_m, tile_n: None), "pingpong"),
        (lambda gemm, config: delattr(config, "GemmConfig"), "GemmConfig"),
        (lambda gemm, config: sys.modules.update({"quack.epilogue.library": None}), "quack.epilogue.library"),
    ],
)
def test_another_version_is_done_without_and_said_once(quack, monkeypatch, change, reason):
    said = []
    monkeypatch.setattr(available, "warn", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    change(*quack)
    assert not any(gated.serves("cuda", torch.bfloat16, torch.bfloat16, 64) for _ in range(3))
    assert (
        len(said) == 1
        and said[0].startswith("the package quack-kernels is installed but can't be used")
        and reason in said[0]
    )


def test_where_it_is_not_installed_nothing_is_said(quack, monkeypatch):
    said = []
    monkeypatch.setattr(available, "warn", said.append)
    monkeypatch.setattr(available, "find_spec", lambda name: None)
    assert "not installed: pip install 'luban[flash]'" in str(gated.missing()) and not said

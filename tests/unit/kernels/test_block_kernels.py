"""Gates and rotations beside matmuls, against plain PyTorch: values and gradients on fresh random input.

On a CPU this runs under Triton's interpreter.
"""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from counted import MatmulCount
from drawn import drawn
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted

from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.base import LayerShape

triton = pytest.importorskip("triton", reason="triton is Linux-only")
DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU else [])]


@pytest.mark.skipif(HERE, reason="runs directly")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


def agree(ours, plain, inputs, dtype):
    """Outputs and gradients of two functions; the plain one in float64, and in `dtype` for the size of the error."""
    results = []
    for function, kind in ((ours, dtype), (plain, torch.float64), (plain, dtype)):
        leaves = [x.to(kind).detach().requires_grad_() for x in inputs]
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        generator = torch.Generator(DEVICE).manual_seed(5)
        loss = sum((o * torch.randn(o.shape, generator=generator, device=DEVICE).to(kind)).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, leaves)])
    for got, right, naive in zip(*results, strict=True):
        error, usual = ((x.double() - right).norm() / right.norm() for x in (got, naive))
        assert error <= (1e-5 if dtype is torch.float32 else 2 * usual)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(3, 40), (17, 2048 + 5)])
def test_swiglu_product(dtype, rows, inner):
    from luban.kernels.reference import swiglu as reference
    from luban.kernels.swiglu import swiglu, swiglu_linear

    def plain(gate_up, weight):
        return reference.swiglu(gate_up) @ weight.t()

    inputs = torch.randn(rows, 2 * inner, device=DEVICE), torch.randn(24, inner, device=DEVICE)
    agree(swiglu_linear, plain, inputs, dtype)
    agree(lambda gate_up, weight: swiglu(gate_up) @ weight.t(), plain, inputs, dtype)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inner"), [(3, 48), (7, 1024 + 16)])
def test_swiglu_rounded_by_rows_is_the_plain_one_rounded(dtype, rows, inner):
    from luban.kernels.reference.swiglu import swiglu
    from luban.kernels.swiglu_rows import swiglu_rows, swiglu_rows_backward
    from luban.nn.float8 import E4M3, by_rows

    gate_up = (torch.randn(rows, 2 * inner, device=DEVICE) * 10.0 ** torch.randint(-3, 3, (rows, 1), device=DEVICE)).to(
        dtype
    )
    d = torch.randn(rows, inner, device=DEVICE, dtype=dtype)
    leaf = gate_up.float().requires_grad_()
    plain = swiglu(leaf)
    (d_plain,) = torch.autograd.grad(plain, leaf, d.float())
    d_gate_up, d_rounded, d_scale, again = swiglu_rows_backward(gate_up, d, E4M3)
    half = 2.0**-8 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(d_gate_up.float(), d_plain, rtol=half, atol=1e-6)
    torch.testing.assert_close(again.float(), plain, rtol=half, atol=1e-6)
    for (values, scale), wide in ((swiglu_rows(gate_up, E4M3), plain), ((d_rounded, d_scale), d_plain)):
        wanted, wanted_scale = by_rows(wide)
        torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
        ours, right = values.float(), wanted.float()
        assert values.dtype == E4M3
        if HERE and not ON_GPU:  # the interpreter's conversion cuts bits off, and forgets to carry
            assert ((ours - right) * scale).norm() < 0.35 * (right * scale).norm()
        else:  # at most the neighbouring number, and that only where the sums' last bits differ
            step = torch.finfo(E4M3).eps * (right.abs() + torch.finfo(E4M3).smallest_normal) * 1.001
            assert ((ours - right).abs() <= step).all() and (ours == right).float().mean() > 0.97


@here
def test_swiglu_between_products_in_8_bits():
    from luban.nn.float8 import FLOAT8

    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, weight, down, do = (
        torch.randn(*s, device=DEVICE).to(dtype) * k
        for s, k in (((32, 64), 1), ((96, 64), 0.2), ((64, 48), 0.2), ((32, 64), 1))
    )

    def one_by_one(x, weight, down):
        gate, up = FLOAT8.linear(x, weight).chunk(2, -1)
        return FLOAT8.linear(F.silu(gate) * up, down)

    def exact(x, weight, down):
        gate, up = (x @ weight.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ down.t()

    found = []
    for function in (
        FLOAT8.swiglu,
        one_by_one,
        exact,
    ):
        leaves = [t.detach().requires_grad_() for t in (x, weight, down)]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, do)])
    for ours, theirs, right in zip(*found, strict=True):
        error, usual = ((t - right).float().norm() / right.float().norm() for t in (ours, theirs))
        assert 0 < error < (1.3 * usual + 0.01 if ON_GPU else 0.4)  # the interpreter cuts bits off


@here
@pytest.mark.parametrize("wanted", drawn([[0], [0, 2], [0, 1], [1, 2], [0, 1, 2]], 2))
def test_what_is_frozen_costs_no_product_in_8_bits(wanted):
    from luban.nn.float8 import FLOAT8

    dtype, shapes = torch.bfloat16 if ON_GPU else torch.float32, ((32, 64), (96, 64), (64, 48))
    values, dy = (
        [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes],
        torch.randn(32, 64, device=DEVICE),
    )
    results = []
    for some in (wanted, (0, 1, 2)):
        leaves = [x.detach().requires_grad_(i in some) for i, x in enumerate(values)]
        out = FLOAT8.swiglu(*leaves)
        with MatmulCount() as counted:
            gradients = torch.autograd.grad(out, [leaves[i] for i in some], dy.to(dtype))
        assert counted.count == 1 + len(some)  # one on the way to the inner activation
        results.append(gradients)
    torch.testing.assert_close(results[0], tuple(results[1][i] for i in wanted))


@here
@pytest.mark.parametrize("kernels", ["swiglu", "gated", "fp8"])
@pytest.mark.parametrize("frozen", drawn([[], ["up"], ["gate", "up"], ["down"], ["gate", "up", "down"]], 2))
def test_a_gated_network_by_every_kernel(kernels, frozen, monkeypatch):
    """Against the plain one; gate and up must not be mistaken for each other."""
    from luban.kernels import gated
    from luban.kernels.reference.swiglu import swiglu_of_pairs
    from luban.nn.float8 import use_float8

    dtype = torch.bfloat16 if ON_GPU else torch.float32
    module = SwiGLU(width=48).build(LayerShape(32, 0, 1, True)).to(DEVICE, dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for name in frozen:
        getattr(module, name).weight.requires_grad_(False)
    plain, calls = copy.deepcopy(module), []

    def by_pairs(x, weight, down):
        calls.append(weight)
        sums = x @ weight.t()
        return swiglu_of_pairs(sums) @ down.t(), sums

    monkeypatch.setattr(gated, "gated_matmuls", by_pairs)
    monkeypatch.setattr(gated, "serves", lambda *_: kernels == "gated")
    if kernels == "fp8":
        use_float8(module)
    x, do = (torch.randn(2, 16, 32, device=DEVICE, dtype=dtype) for _ in range(2))
    found = []
    for each in (module, plain):
        leaf = x.detach().requires_grad_()
        gate, up, down = (getattr(each, name).weight for name in ("gate", "up", "down"))
        out = each(leaf) if each is module else (F.silu(leaf @ gate.t()) * (leaf @ up.t())) @ down.t()
        out.backward(do)
        found.append([out, leaf.grad, *(weight.grad for weight in (gate, up, down))])
    assert bool(calls) == (kernels == "gated")
    for ours, right in zip(*found, strict=True):
        assert (ours is None) == (right is None)
        if right is not None:
            assert (ours - right).norm() / right.norm() < (
                0.4 if kernels == "fp8" else 0.02 if ON_GPU else 1e-5
            )  # fp8 loses bits twice


@here
def test_a_frozen_weight_behind_swiglu_costs_no_product():
    from luban.kernels.swiglu import swiglu_linear

    values, dy, results = (
        (torch.randn(5, 96, device=DEVICE), torch.randn(24, 48, device=DEVICE)),
        torch.randn(5, 24),
        [],
    )
    for frozen in (True, False):
        gate_up, weight = values[0].detach().requires_grad_(), values[1].detach().requires_grad_(not frozen)
        out = swiglu_linear(gate_up, weight)
        with MatmulCount() as counted:
            out.backward(dy.to(DEVICE))
        assert counted.count == (1 if frozen else 2)
        results.append(gate_up.grad)
    torch.testing.assert_close(*results)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_positions", [False, True])
def test_packed_rotation(dtype, own_positions):
    from luban.kernels.reference import rotary as reference
    from luban.kernels.rotary import apply_rotary_qkv
    from luban.nn.position.rope import Rope, rotary_cos_sin

    B, T, K, D = 2, 7, random.choice([1, 2, 3]), random.choice([8, 16])
    H = K * random.choice([1, 4, 5])
    positions = torch.randint(0, 900, (B if own_positions else 1, T), device=DEVICE)
    cos, sin = rotary_cos_sin(Rope(), positions, D)

    agree(
        lambda packed: apply_rotary_qkv(packed, cos, sin, H, K),
        lambda packed: reference.rotate_packed(packed, cos, sin, H, K),
        [torch.randn(B, T, (H + 2 * K) * D, device=DEVICE)],
        dtype,
    )


@here
@pytest.mark.parametrize("block", drawn(["pre", "post", "parallel"], 1))
@pytest.mark.parametrize("precision", ["plain", "compiled"] if ON_GPU else ["plain"])
def test_a_decoder_trains_the_same_with_and_without_the_kernels(block, precision, monkeypatch):
    from luban.models.arrangement.base import Arrangement
    from luban.models.build import build_model
    from luban.models.spec import uniform
    from luban.nn import linear
    from luban.nn.mixer import grouped
    from luban.objectives.causal import Causal
    from luban.parallel.compile import compiled_loss

    spec = uniform(
        vocab_size=97,
        width=64,
        layers=2,
        arrangement=Arrangement.registry[block](),
        mixer=grouped.Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=96),
    )
    tokens = torch.randint(0, 97, (2, 13), device=DEVICE)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": torch.rand(2, 12, device=DEVICE) < 0.8,
        "documents": None,
        "positions": None,
    }
    found = []
    for fused in (True, False):
        module = build_model(spec, device=torch.device(DEVICE), seed=3)
        if not fused:
            monkeypatch.setattr(linear, "trains_fused", lambda x: False)
        loss = Causal().loss(module)
        loss = (compiled_loss(loss, regions=True) if precision == "compiled" else loss)(batch).sum
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in module.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4 if ON_GPU else 1e-5, atol=0)
    for name, gradient in found[1][1].items():
        error = (found[0][1][name] - gradient).norm() / gradient.norm()
        assert error < (5e-3 if ON_GPU else 1e-5), name  # a GPU multiplies float32 in tf32

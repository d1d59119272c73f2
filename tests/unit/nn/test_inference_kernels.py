"""Inference with fused kernels and weights that lie one after another, against plain PyTorch on fresh random input.

On a CPU this runs under Triton's interpreter.
"""

import random
from contextlib import nullcontext

import pytest
import torch
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted
from torch import nn

import luban
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.linear import JointLinear, QKVLinear, adjacent, joined, lay_adjacent
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm
from luban.nn.position.rope import Rope
from luban.nn.row import linear

DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU else [])]


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is Linux-only")
    run_interpreted(__file__)


def fresh() -> random.Random:
    seed = random.randrange(2**32)
    torch.manual_seed(seed)
    return random.Random(seed)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_rms_norm(dtype, eps):
    rng = fresh()
    norm = RMSNorm(eps=eps).build(width := rng.randrange(1, 300)).to(DEVICE)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(3, rng.randrange(1, 5), 2 * width, device=DEVICE, dtype=dtype)[..., :width]  # rows apart in memory
    x = x * torch.rand(3, 1, 1, device=DEVICE) * 3
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double()
    with torch.no_grad():
        found = norm(x.to(dtype))
    assert found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@here
def test_rms_norm_of_half_precision_squares_and_of_double_precision():
    norm = RMSNorm().build(64).to(DEVICE)
    big = torch.full((2, 64), 300.0, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(norm(big), torch.ones_like(big))  # 300² would be infinite
        exact = torch.randn(2, 64, device=DEVICE, dtype=torch.float64)
        found = norm.double()(exact)
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_few_rows_times_a_matrix(dtype, rows):
    rng = fresh()
    inputs, outputs = rng.randrange(1, 2500), rng.randrange(1, 60)
    x = torch.randn(rows, 1, 2 * inputs, device=DEVICE, dtype=dtype)[..., :inputs]
    whole = torch.randn(outputs + 3, inputs + 5, device=DEVICE, dtype=dtype)
    weight, bias = whole[3:, :inputs], torch.randn(outputs, device=DEVICE, dtype=dtype)
    from luban.kernels.gemv import gemv, serves

    assert serves(x, weight) and not serves(x.expand(rows, 5, -1), weight) and not serves(x, whole.t())
    for added in (None, bias):
        found = gemv(x, weight, added)
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
        assert found.shape == expected.shape and found.dtype == dtype
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), found)
    assert linear(x, weight.clone().requires_grad_(), bias).requires_grad


def model(dtype: torch.dtype, bias: bool) -> nn.Module:
    spec = uniform(
        vocab_size=61,
        width=64,
        context=48,
        layers=2,
        mixer=Grouped(heads=4, kv_heads=2, qkv_bias=bias),
        feedforward=SwiGLU(width=72),
        norm=RMSNorm(),
        position=Rope(),
        init=NormalInit(std=0.2),
    )
    return luban.build_model(spec, device=DEVICE, dtype=dtype).eval()


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_is_the_same_before_and_after(dtype, bias):
    rng = fresh()
    module = model(dtype, bias)
    if bias:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
    tokens = torch.randint(61, (2, rng.randrange(2, 12)), device=DEVICE)
    before, exact = module(tokens), module.double()(tokens)
    module.to(dtype)
    names, values = list(module.state_dict()), [x.clone() for x in module.state_dict().values()]
    lay_adjacent(module)
    assert list(module.state_dict()) == names
    for value, now in zip(values, module.state_dict().values(), strict=True):
        assert torch.equal(value, now)
    calls = {"rotary": 0, "swiglu": 0}
    with Counted(calls), torch.no_grad():
        after = module(tokens)
    assert calls == {"rotary": 2, "swiglu": 2}
    usual = (before.double() - exact).abs().max()
    assert (after.double() - exact).abs().max() <= (2e-5 if dtype == torch.float32 else 2 * usual)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts kernels of Luban's."""

    def __init__(self, calls):
        super().__init__()
        from luban.kernels import rotary, swiglu  # noqa: F401 (registers the operations)

        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls["rotary"] += function is torch.ops.luban.apply_rotary_qkv.default
        self.calls["swiglu"] += function is torch.ops.luban.swiglu.default
        return function(*args, **(kwargs or {}))


@here
def test_double_precision_keeps_to_plain_pytorch():
    module = model(torch.float64, False)
    lay_adjacent(module)
    tokens = torch.randint(61, (1, 30), device=DEVICE)
    for gradients in (nullcontext(), torch.no_grad()):
        calls = {"rotary": 0, "swiglu": 0}
        with Counted(calls), gradients:
            module(tokens)
        assert not any(calls.values())


def test_adjacent_weights_are_not_copied_and_stay_parameters():
    linear = QKVLinear(8, queries=12, keys=4, bias=True)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    parts = linear.joint_projections()
    parameters = [p.weight for p in parts]
    expected, bias = joined(*parts)
    assert not adjacent(*parts)
    lay_adjacent(linear)
    assert adjacent(*parts) and [p.weight for p in parts] == parameters
    with torch.no_grad():
        found, found_bias = joined(*parts)
    assert torch.equal(found, expected) and torch.equal(found_bias, bias)
    assert found.data_ptr() == parameters[0].data_ptr()
    with torch.no_grad():
        parameters[1].fill_(7)  # a change of a parameter is a change of the whole
    assert (found[12:16] == 7).all()
    grown, _ = joined(*parts)  # with gradients it is a copy, as every parameter needs its own
    grown.sum().backward()
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in parameters)


def test_weights_that_were_moved_or_replaced_are_not_adjacent():
    linear = JointLinear(4, {"q": 3, "k": 3}, bias=False)
    lay_adjacent(linear)
    first, second = linear.joint_projections()
    first.weight.data, second.weight.data = second.weight.data, first.weight.data
    assert not adjacent(first, second)
    lay_adjacent(linear)
    second.weight = nn.Parameter(second.weight.detach().clone())
    assert not adjacent(first, second)


def test_adapters_are_added_to_adjacent_weights():
    linear = JointLinear(4, {"q": 3, "k": 5}, bias=False)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    linear.add_adapter("k", nn.Linear(4, 5))
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = linear(x)
        lay_adjacent(linear)
        found = linear(x, joint=True).split([3, 5], -1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

"""Weights in 8 bits with a scale an output, multiplied by kernels: any number of rows, against float64.

On a CPU the kernels run under Triton's interpreter.
"""

from __future__ import annotations

import random

import pytest
import torch
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted

from luban.core.errors import UnsupportedError
from luban.kernels.scaled_matmul import MOST_ROWS
from luban.load.model import load_model
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.int8 import pack_for_inference
from luban.nn.linear import matmul_owners
from luban.nn.mixer.grouped import Grouped
from luban.nn.scaled_weight import Float8Scaled, Int8Scaled

KINDS = pytest.mark.parametrize("kind", [Int8Scaled, Float8Scaled])
DTYPES = [torch.float32, *([torch.bfloat16] if ON_GPU else [])]


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is Linux-only")
    run_interpreted(__file__)


def fresh() -> random.Random:
    seed = random.randrange(2**32)
    torch.manual_seed(seed)
    return random.Random(seed)


@KINDS
def test_weights_are_rounded_to_the_nearest_of_their_output(kind):
    fresh()
    weight = torch.randn(23, 40) * torch.rand(23, 1) * 3
    weight[3] = 0
    packed = kind(weight)
    rounded = packed.numbers.float() * packed.scale[:, None]
    largest = weight.abs().amax(1, keepdim=True)
    assert (rounded.abs().amax(1, keepdim=True) - largest).abs().max() <= largest.max() * 1e-6
    if kind is Int8Scaled:
        assert ((rounded - weight).abs() <= packed.scale[:, None] / 2 * 1.001).all()
    else:  # half a step of three bits, and of the smallest numbers
        assert ((rounded - weight).abs() <= weight.abs() / 16 + packed.scale[:, None] * 2**-10).all()
    assert torch.equal(rounded[3], torch.zeros(40))


@here
@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(kind, dtype):
    rng = fresh()
    inputs, outputs = rng.randrange(1, 300), rng.randrange(1, 100)
    bias = torch.randn(outputs, device=DEVICE) if rng.random() < 0.5 else None
    packed = kind(torch.randn(outputs, inputs, device=DEVICE), bias)
    rounded = packed.numbers.double() * packed.scale.double()[:, None]
    for rows in (0, 1, 2, 3, 4, 17, 40, 70, MOST_ROWS + 1):
        x = torch.randn(2 if rows % 2 == 0 else 1, -(-rows // 2) if rows % 2 == 0 else rows, 2 * inputs, device=DEVICE)
        x = x.to(dtype)[..., :inputs]
        with torch.inference_mode():
            found = packed(x)
        expected = x.double() @ rounded.T + (0 if bias is None else bias.double())
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@here
@KINDS
def test_a_packed_model_stays_near_the_plain_one(kind):
    fresh()
    spec = uniform(
        vocab_size=60,
        width=64,
        layers=2,
        context=64,
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=96),
        init=NormalInit(std=0.1),
    )
    model, packed = (build_model(spec, seed=5, device=DEVICE).eval() for _ in range(2))
    for _, owner in list(matmul_owners(packed)):
        owner.pack(kind)
    tokens = torch.randint(0, 60, (2, 30), device=DEVICE)
    with torch.inference_mode():
        plain, found = model(tokens).float(), packed(tokens).float()
    assert 0 < (plain - found).norm() / plain.norm() < 0.1


def test_fp8_is_refused_where_it_is_not_served(tiny_checkpoint):
    if ON_GPU:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UnsupportedError, match="use --dtype int8 or bfloat16"):
        load_model(tiny_checkpoint, dtype="fp8")
    with pytest.raises(UnsupportedError, match="use --dtype int8 or bfloat16"):
        pack_for_inference(load_model(tiny_checkpoint).module, "fp8")

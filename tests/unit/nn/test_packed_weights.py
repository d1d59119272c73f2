"""Weights in 8 and 4 bits: the definition of NF4, errors by brute force, gradients of inputs."""

from __future__ import annotations

import random

import pytest
import torch
from torch.distributions import Normal

from luban.nn.packed import NF4, Int8Rows, normal_float


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(random.SystemRandom().randrange(2**31))


def test_the_values_are_quantiles_of_the_normal_distribution():
    """Appendix E of the paper prints them; the quantiles by another implementation."""
    printed = [
        *(
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
        ),
        *(
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
        ),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    assert normal_float() == pytest.approx(printed, abs=1e-6)
    quantile = Normal(0.0, 1.0).icdf(torch.tensor(1 - (1 / 30 + 1 / 32) / 2)).item()
    middle = Normal(0.0, 1.0).icdf(torch.tensor(1 - (1 / 30 + 1 / 32) / 2 - 0.4677083 / 8)).item()
    assert normal_float()[-2] == pytest.approx(middle / quantile, abs=1e-4)


def test_every_number_is_the_nearest_value():
    """Of its block, by the scale of 64 numbers, which itself is off by at most half a step of float8."""
    weight = torch.randn(48, 80) * torch.rand(48, 1)
    packed = NF4(weight)
    blocks, found = weight.flatten().view(-1, 64), packed.weight(torch.float32).flatten().view(-1, 64)
    scales = packed._largest()[: len(blocks)]
    largest = blocks.abs().amax(1)
    spread = (largest - largest.mean()).abs().max()
    assert ((scales - largest).abs() <= spread / 16).all()
    candidates = scales[:, None, None] * torch.tensor(normal_float())
    nearest = (blocks[..., None] - candidates).abs().min(-1).values
    torch.testing.assert_close((blocks - found).abs(), nearest, rtol=1e-4, atol=1e-6)
    bits = 8 * sum(getattr(packed, name).nbytes for name in ("indices", "scales"))
    assert bits <= weight.numel() * 4 + 8 * (len(blocks) + 255)


def test_a_block_of_nearly_zero_numbers_keeps_their_signs():
    """Its scale in float8, which is rounded below the mean of all, would be negative for some of these."""
    for tiny in torch.linspace(0, 0.01, 40):
        weight = torch.randn(16, 64) * torch.rand(16, 1)
        weight[3] = tiny * torch.randn(64)
        found = NF4(weight).weight(torch.float32)
        assert (found * weight >= 0).all()


@pytest.mark.parametrize(("kind", "most"), [(Int8Rows, 0.01), (NF4, 0.12)])
def test_matmul_and_gradient_are_those_of_the_unpacked_weight(kind, most):
    weight, bias = torch.randn(24, 50), torch.randn(24)
    packed, x = kind(weight, bias), torch.randn(3, 7, 50, requires_grad=True)
    y = packed(x)
    right = packed.weight(torch.float32)
    torch.testing.assert_close(y, x @ right.t() + bias, rtol=1e-5, atol=1e-5)
    up = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, up)
    torch.testing.assert_close(gradient, up @ right, rtol=1e-5, atol=1e-5)
    error = (right - weight).norm() / weight.norm()
    assert error < most and not list(packed.parameters()) and not packed.state_dict()

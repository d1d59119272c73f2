"""Position methods against the equations of their papers."""

from __future__ import annotations

import math

import pytest
import torch

from luban.kernels.distance import alibi_slopes
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import PositionShape
from luban.nn.position.rope import Rope
from luban.nn.position.sinusoidal import Sinusoidal

SHAPE = PositionShape(width=12, heads=6, head_dim=8, context=64)


def rotated(method, q, k, positions):
    return method(positions, positions).rotation.apply_rotary(q, k)


def slopes(heads):
    return alibi_slopes(heads).tolist()


def test_alibi_slopes_are_exact():
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert slopes(16)[:3] == pytest.approx([2**-0.5, 2**-1.0, 2**-1.5], rel=1e-7)
    assert slopes(12) == slopes(8) + slopes(16)[::2][:4]
    assert slopes(1) == [2.0**-8] and len(slopes(71)) == 71


def test_alibi_agrees_with_bloom():
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in (1, 2, 3, 6, 8, 12, 71):
        theirs = modeling.build_alibi_tensor(torch.ones(1, 5, dtype=torch.long), heads, torch.float32)
        per_position = theirs.reshape(heads, 5)  # slope · key position: the query's share cancels in the softmax
        torch.testing.assert_close(per_position[:, 1], torch.tensor(slopes(heads)), rtol=1e-5, atol=0)


def test_alibi_bias_is_distance_times_slope():
    method = Alibi().build(SHAPE)
    queries, keys = torch.randint(0, 50, (2, 4)), torch.randint(0, 50, (2, 7))
    bias = method(queries, keys).bias()
    for b, h, t, s in ((0, 0, 0, 0), (1, 5, 3, 6), (1, 2, 1, 4)):
        assert bias[b, h, t, s].item() == pytest.approx(-slopes(6)[h] * abs(queries[b, t] - keys[b, s]).item())


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("width", [None, 4])
def test_rotary_scores_depend_on_distance_alone(pairing, width):
    method = Rope(base=100.0, pairing=pairing, width=width).build(SHAPE)
    q, k = torch.randn(2, 1, 1, 5, 8)

    def scores(shift):
        turned, other = rotated(method, q, k, torch.arange(5)[None] + shift)
        return turned @ other.transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(1000), atol=1e-3, rtol=0)
    assert not torch.allclose(scores(0), q @ k.transpose(-1, -2), atol=1e-2)


def test_rotary_pairs_turn_by_their_angles():
    """Each pair as a complex number times e^(i·position·base^(−2j/width)), in both conventions."""
    x, positions = torch.randn(1, 1, 3, 8, dtype=torch.float64), torch.tensor([[0, 7, 31]])
    for pairing in ("half", "interleaved"):
        method = Rope(base=50.0, pairing=pairing).build(SHAPE)
        turned, _ = rotated(method, x, x, positions)
        for t, place in enumerate(positions[0].tolist()):
            for j in range(4):
                a, b = (j, j + 4) if pairing == "half" else (2 * j, 2 * j + 1)
                angle = place * 50.0 ** (-2 * j / 8)
                expected = complex(x[0, 0, t, a], x[0, 0, t, b]) * complex(math.cos(angle), math.sin(angle))
                got = complex(turned[0, 0, t, a], turned[0, 0, t, b])
                assert abs(got - expected) < 1e-5


def test_sinusoids_follow_the_equation():
    method = Sinusoidal(base=1000.0).build(SHAPE)
    x, positions = torch.randn(1, 3, 12), torch.tensor([[0, 5, 63]])
    added = method.embed(x, positions) - x * math.sqrt(12)
    for t, p in enumerate(positions[0].tolist()):
        for i in range(6):
            angle = p / 1000.0 ** (2 * i / 12)
            assert added[0, t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert added[0, t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_queries_and_keys_turned_together_are_as_turned_apart():
    heads, key_heads, head_dim = 6, 2, 16
    method = Rope(pairing="half").build(PositionShape(width=96, heads=heads, head_dim=head_dim, context=64))
    rotation = method(torch.randint(0, 50, (2, 5)), torch.zeros(2, 5)).rotation
    packed = torch.randn(2, 5, (heads + 2 * key_heads) * head_dim)
    q, k, v = packed.unflatten(-1, (-1, head_dim)).transpose(1, 2).split([heads, key_heads, key_heads], dim=1)
    for got, want in zip(
        rotation.apply_rotary_qkv(packed, heads, key_heads), (*rotation.apply_rotary(q, k), v), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)

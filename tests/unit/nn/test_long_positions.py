"""Position methods made for length, each against its paper's equation written out."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional as F

from luban import build_model
from luban.core.errors import ConfigError
from luban.generate.cache import ContiguousCache
from luban.kernels.distance import alibi_slopes
from luban.models.spec import changed, uniform
from luban.nn.init import NormalInit, initialise
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import PositionShape
from luban.nn.position.kerple import KerpleLog, KerplePower
from luban.nn.position.logn import LogN
from luban.nn.position.none import NoPosition
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import NTK, Linear, YaRN
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.two_dimensional import Learned2D, Rope2D
from luban.nn.position.xpos import XPos

SHAPE = PositionShape(width=12, heads=6, head_dim=8, context=300)


def started(config, shape=SHAPE):
    method = config.build(shape)
    initialise(method, NormalInit(std=1.0), layers=1, seed=random.randrange(1000))
    return method


def rotated(method, q, k, positions):
    return method(positions, positions).rotation.apply_rotary(q, k)


def places():
    return torch.randint(0, 300, (2, 4)), torch.randint(0, 300, (2, 7))


def test_kerple_begins_as_alibi():
    """r2 = 1 and r1 = slope·√D: the same bias, as KERPLE's stands inside the division by √D."""
    queries, keys = places()
    torch.testing.assert_close(
        started(KerplePower())(queries, keys).bias(), started(Alibi())(queries, keys).bias(), rtol=1e-5, atol=1e-6
    )


def test_the_logarithmic_kernel_begins_next_to_the_diagonal_as_alibi():
    """−2·log(1 + slope/2·distance) after the division by √D: ALiBi's slope at distance 0, ever flatter from there."""
    shape = PositionShape(width=24, heads=4, head_dim=6, context=16)
    module = started(KerpleLog(), shape)
    distance = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    slopes = alibi_slopes(4)[:, None, None]
    positions = torch.arange(16)[None]
    found = module(positions, positions).bias()[0]
    torch.testing.assert_close(found, -2 * torch.log1p(slopes / 2 * distance), atol=1e-5, rtol=1e-5)
    assert (found >= -slopes * distance - 1e-6).all()


@pytest.mark.parametrize("config", [KerplePower(), KerpleLog()])
def test_kerple_follows_its_equation_and_learns(config):
    method, (queries, keys) = config.build(SHAPE).double(), places()
    raw1, raw2 = (torch.randn(6, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        method.raw1.copy_(raw1)
        method.raw2.copy_(raw2)
    got = method(queries, keys).bias()
    r1 = F.softplus(raw1)[:, None, None]
    distance = (queries[:, None, :, None] - keys[:, None, None, :]).abs().float()
    if isinstance(config, KerplePower):
        r2 = (2 * raw2.sigmoid())[:, None, None]
        expected = -r1 * torch.where(distance == 0, 0.0, distance.clamp_min(1e-9) ** r2) / math.sqrt(8)
    else:
        expected = -r1 * (1 + F.softplus(raw2)[:, None, None] * distance).log() / math.sqrt(8)
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(expected)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(method.raw1.grad.float(), raw1.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(method.raw2.grad.float(), raw2.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config", [Alibi(), KerplePower(), KerpleLog(), RelativeBias(), RelativeBias(buckets=8)], ids=repr
)
def test_biases_as_formulas_of_the_distance_are_those_of_the_positions(config):
    method, at = started(config), torch.arange(200)
    encoding = method(at[None], at[None])
    described = encoding.distance_bias
    assert described.form == method.bias_form
    expected = described.table()[:, at[:, None] - at[None] + described.zero]
    torch.testing.assert_close(encoding.bias()[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_t5_buckets_equal_transformers(causal):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    shape = PositionShape(width=12, heads=6, head_dim=8, context=300, causal=causal)
    method, (queries, keys) = started(RelativeBias(buckets=16, max_distance=90), shape), places()
    buckets = modeling.T5Attention._relative_position_bucket(
        keys[:, None, :] - queries[:, :, None], bidirectional=not causal, num_buckets=16, max_distance=90
    )
    expected = method.weight[buckets].permute(0, 3, 1, 2)
    torch.testing.assert_close(method(queries, keys).bias(), expected, rtol=0, atol=0)


def scores(method, q, k, positions):
    turned, other = rotated(method, q, k, positions)
    return turned @ other.transpose(-1, -2)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_xpos_follows_its_equation_and_is_invariant_to_a_shift(pairing):
    method = XPos(base=50.0, pairing=pairing, span=100.0).build(SHAPE)
    q, k = torch.randn(2, 1, 1, 3, 8)
    positions = torch.tensor([[0, 9, 140]])
    got = scores(method, q, k, positions)
    for n in range(3):
        for m in range(3):
            expected = 0.0
            distance = (positions[0, n] - positions[0, m]).item()
            for i in range(4):
                a, b = (i, i + 4) if pairing == "half" else (2 * i, 2 * i + 1)
                zeta = (2 * i + 0.4 * 8) / (1.4 * 8)
                product = complex(q[0, 0, n, a], q[0, 0, n, b]) * complex(k[0, 0, m, a], k[0, 0, m, b]).conjugate()
                angle = distance * 50.0 ** (-2 * i / 8)
                expected += (product * complex(math.cos(angle), math.sin(angle))).real * zeta ** (distance / 100)
            assert got[0, 0, n, m].item() == pytest.approx(expected, abs=1e-3, rel=1e-3)
    causal = torch.ones(3, 3).tril().bool()  # without the future, where the factor grows
    torch.testing.assert_close(
        scores(method, q, k, positions + 77)[0, 0][causal], got[0, 0][causal], atol=1e-4, rtol=1e-4
    )


def test_xpos_decays_and_stays_finite_in_half_precision():
    shape = PositionShape(width=64, heads=1, head_dim=64, context=8192)
    method, ones = XPos().build(shape), torch.ones(1, 1, 8192, 64)
    turned, other = rotated(method, ones.half(), ones.half(), torch.arange(8192)[None])
    assert turned.isfinite().all() and other.isfinite().all()
    made = [method(at, at).rotation for at in (torch.tensor([[n, 0]]) for n in (0, 128, 512, 2048))]
    decay = [
        (r.queries[0][0, 0, 0].hypot(r.queries[1][0, 0, 0]) * r.keys[0][0, 0, 1].hypot(r.keys[1][0, 0, 1]))
        .mean()
        .item()
        for r in made
    ]
    assert decay[0] == pytest.approx(1.0) and decay == sorted(decay, reverse=True) and decay[-1] < 0.6


def test_log_n_is_one_up_to_the_training_length_and_follows_the_logarithm():
    method = LogN(inner=NoPosition(), trained=64).build(SHAPE)
    q = torch.randn(1, 2, 300, 8)
    turned, kept = rotated(method, q, q, torch.arange(300)[None])
    assert torch.equal(turned[:, :, :64], q[:, :, :64]) and torch.equal(kept, q)
    expected = q[0, 0, 255] * math.log(256) / math.log(64)
    torch.testing.assert_close(turned[0, 0, 255], expected)
    with pytest.raises(ConfigError, match="needs a causal model"):
        LogN().check(PositionShape(width=12, heads=6, head_dim=8, context=9, causal=False))


def test_log_n_keeps_entropy_steady():
    """Over random keys the entropy, as a share of the largest, falls less than half as much as unscaled."""
    torch.manual_seed(random.randrange(1000))

    def sharpness(n, factor):
        logits = 2.0 * torch.randn(400, n) * factor
        p = logits.softmax(-1)
        return -(p * p.clamp_min(1e-30).log()).sum(-1).mean().item()

    drift = {
        name: sharpness(8192, math.log(8192) / math.log(512) if name == "scaled" else 1.0) - sharpness(512, 1.0)
        for name in ("scaled", "plain")
    }
    assert abs(drift["scaled"]) < 0.5 * abs(drift["plain"])


def test_randomised_positions_are_sorted_distinct_and_drawn_anew_in_training():
    method = Randomised(inner=NoPosition(), longest=2048).build(SHAPE)
    counted = torch.arange(200)[None]
    draws = [method.map_positions(counted, counted, cached=False)[0] for _ in range(2)]
    for drawn in draws:
        assert drawn.shape == (1, 200) and (drawn.diff() > 0).all() and drawn.min() >= 0 and drawn.max() < 2048
    assert not torch.equal(*draws)
    assert torch.stack(draws).float().mean() == pytest.approx(1024, abs=150)
    method.eval()
    first, again = (method.map_positions(counted, counted, cached=False)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ConfigError, match="longest ≥ the context of 300"):
        Randomised(longest=200).check(SHAPE)


def test_randomised_positions_reach_the_method_inside():
    spec = uniform(
        vocab_size=30,
        width=24,
        layers=2,
        context=40,
        mixer=Grouped(heads=3),
        position=Randomised(inner=Rope(), longest=500),
    )
    model, tokens = build_model(spec).eval(), torch.randint(0, 30, (2, 11))
    plain = build_model(uniform(vocab_size=30, width=24, layers=2, context=40, mixer=Grouped(heads=3)))
    drawn = model.decoder.position.draw(11, tokens.device)[None]
    torch.testing.assert_close(model(tokens), plain(tokens, positions=drawn))
    wrapped = uniform(
        vocab_size=30,
        width=24,
        layers=2,
        mixer=Grouped(heads=3),
        context=40,
        position=Randomised(inner=KerpleLog(), longest=64),
    )
    assert build_model(wrapped)(tokens).isfinite().all()


def test_two_dimensional_rotation_is_one_rotation_a_half():
    method, rope = (
        Rope2D(base=30.0).build(SHAPE),
        Rope(base=30.0).build(PositionShape(width=12, heads=6, head_dim=4, context=9)),
    )
    q, positions = torch.randn(2, 6, 5, 8), torch.randint(0, 9, (2, 2, 5))
    turned, _ = rotated(method, q, q, positions)
    for half in range(2):
        part = q[..., 4 * half : 4 * half + 4]
        expected, _ = rotated(rope, part, part, positions[:, half])
        torch.testing.assert_close(turned[..., 4 * half : 4 * half + 4], expected)
    plain, _ = rotated(method, q, q, positions[:, 0])
    assert torch.equal(plain[..., 4:], q[..., 4:])  # outside blanks nothing turns


def test_two_learned_tables_are_both_added():
    method = started(Learned2D())
    x, positions = torch.randn(2, 5, 12), torch.randint(0, 300, (2, 2, 5))
    expected = x + method.table.weight[positions[:, 0]] + method.block_table.weight[positions[:, 1]]
    torch.testing.assert_close(method.embed(x, positions), expected)


def frequencies(scaling, width=16, base=10_000.0):
    return scaling.scaled(base ** -(torch.arange(0, width, 2) / width), base)


def test_scalings_at_their_ends():
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(frequencies(Linear(factor=4.0)), plain / 4)
    larger = 10_000.0 * 4.0 ** (16 / 14)  # the base of equation 16
    torch.testing.assert_close(frequencies(NTK(factor=4.0)), larger ** -(torch.arange(0, 16, 2) / 16))
    yarn = frequencies(YaRN(factor=4.0, original=4096))
    assert yarn[0] == plain[0] and yarn[-1] == pytest.approx(plain[-1].item() / 4)
    assert YaRN(factor=4.0, original=4096).amplitude == pytest.approx(0.1 * math.log(4) + 1)
    with pytest.raises(ConfigError, match="at least 1"):
        Linear(factor=0.5)


def test_randomised_positions_with_a_cache_are_those_of_the_context():
    spec = uniform(
        vocab_size=30,
        width=24,
        layers=2,
        context=40,
        mixer=Grouped(heads=3),
        position=Randomised(inner=Alibi(), longest=500),
    )
    model, tokens = build_model(spec).eval(), torch.randint(0, 30, (1, 11))
    cache = ContiguousCache.of(model, 1)
    pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 6], dim=1)]
    plain = build_model(changed(spec, position=Alibi())).eval()
    drawn = model.decoder.position.draw(40, tokens.device)[None, :11]
    torch.testing.assert_close(torch.cat(pieces, 1), plain(tokens, positions=drawn))

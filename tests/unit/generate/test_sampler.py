"""Samplers against plain computations over sorted lists."""

from __future__ import annotations

import math
import random

import pytest
import torch

from luban.core.errors import ConfigError
from luban.generate.logits import penalise
from luban.generate.sampler import sample, uniform
from luban.generate.sampling import Sampling


def one(logits, sampling, draw) -> int:
    return sample(logits[None], [sampling], [draw]).item()


def by_hand(logits: list[float], s: Sampling) -> dict[int, float]:
    """Token → probability after temperature, top-k, top-p, min-p."""
    top = max(logits)
    weights = [math.exp((x - top) / s.temperature) for x in logits]
    left = sorted(((w / sum(weights), -i) for i, w in enumerate(weights)), reverse=True)
    left = left[: s.top_k] if s.top_k else left
    kept, mass = [], 0.0
    for p, i in left:
        if mass < s.top_p * sum(q for q, _ in left) or s.top_p == 1:
            kept.append((p, i))
            mass += p
    kept = [(p, i) for p, i in kept if p >= s.min_p * kept[0][0]]
    return {-i: p / sum(q for q, _ in kept) for p, i in kept}


@pytest.mark.parametrize("_", range(12))
def test_distribution_equals_the_plain_one(_):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    logits = [rng.gauss(0, 2) for _ in range(rng.randrange(1, 30))]
    s = Sampling(
        temperature=rng.choice([0.5, 1, 1.7]),
        top_k=rng.choice([0, 1, 4, 100]),
        top_p=rng.choice([1, 0.9, 0.3, 1e-9]),
        min_p=rng.choice([0, 0.1, 1]),
    )
    expected, count, draws = by_hand(logits, s), {}, 400
    quantiles = [(i + 0.5) / draws for i in range(draws)]  # frequencies within one draw of the probabilities
    rows = torch.tensor(logits, dtype=torch.float64).expand(draws, -1)
    for token in sample(rows, [s] * draws, quantiles).tolist():
        count[token] = count.get(token, 0) + 1
    assert set(count) <= set(expected), seed
    for token, p in expected.items():
        assert abs(count.get(token, 0) / draws - p) <= 1.01 / draws, seed


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([0.0, 5.0, 1.0])
    assert one(logits, Sampling(), 0.0) == 1
    assert one(logits, Sampling(), 1 - 2**-53) == 0
    assert one(logits, Sampling(top_k=2), 1 - 2**-53) == 2
    assert one(logits, Sampling(temperature=0), 0.999) == 1


def test_uniform_is_a_pure_function_and_uniform():
    draws = [uniform(7, choice, step) for choice in range(10) for step in range(200)]
    assert draws == [uniform(7, choice, step) for choice in range(10) for step in range(200)]
    assert len(set(draws)) == len(draws) and min(draws) >= 0 and max(draws) < 1
    assert abs(sum(draws) / len(draws) - 0.5) < 4 / math.sqrt(12 * len(draws))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("max_tokens", 0),
        ("n", 0),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_refuses_by_field(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})


def test_a_row_does_not_depend_on_the_others():
    """Rows with settings of their own in one batch equal each row alone, greedy ones among them."""
    rng = random.Random(random.randrange(2**32))
    settings = [
        Sampling(
            temperature=rng.choice([0, 0.7, 1.3]),
            top_k=rng.choice([0, 1, 5]),
            top_p=rng.choice([1, 0.6]),
            min_p=rng.choice([0, 0.2]),
        )
        for _ in range(40)
    ]
    logits, draws = torch.randn(40, 23), [rng.random() for _ in range(40)]
    alone = [one(row, s, u) for row, s, u in zip(logits, settings, draws, strict=True)]
    assert sample(logits, settings, draws).tolist() == alone


def test_penalties_touch_what_each_row_has_seen():
    logits = torch.randn(3, 7)
    got = penalise(logits, [[1, 1, 4], [0], [2, 3]], [2.0, 1.0, 0.5])
    expected = logits.clone()
    for row, tokens, penalty in ((0, (1, 4), 2.0), (2, (2, 3), 0.5)):
        for token in tokens:
            value = logits[row, token]
            expected[row, token] = value / penalty if value > 0 else value * penalty
    torch.testing.assert_close(got, expected)

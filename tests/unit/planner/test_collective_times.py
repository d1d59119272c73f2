"""Collectives priced by closed form, fluid rates and packets, from constants fitted to measured times."""

import numpy as np
import pytest

from luban.core.errors import UsageError
from luban.planner.collective_times import SWEEPS, Links, fit

SIZES = [1 << n for n in range(20, 31)]


def test_constants_come_back_from_times_that_they_give():
    rng = np.random.default_rng()
    for _ in range(5):
        links = Links(int(rng.integers(2, 9)), float(rng.uniform(1e-6, 1e-4)), float(rng.uniform(1e-12, 1e-9)))
        exact = [links.closed_form("all_reduce", size) for size in SIZES]
        found = fit(links.processes, SIZES, exact)
        assert (found.alpha, found.beta) == pytest.approx((links.alpha, links.beta), rel=1e-6)
        noisy = [t * rng.uniform(0.95, 1.05) for t in exact]
        found = fit(links.processes, SIZES[::2], noisy[::2])
        assert [found.closed_form("all_reduce", s) for s in SIZES] == pytest.approx(exact, rel=0.08)


def test_latency_below_nothing_is_left_out():
    found = fit(2, SIZES, [1e-9 * size * (0.9 if size < 1 << 24 else 1.0) - 1e-7 for size in SIZES])
    assert found.alpha == 0 and found.beta == pytest.approx(1e-9, rel=0.15)


@pytest.mark.parametrize("collective", SWEEPS)
@pytest.mark.parametrize(("processes", "size"), [(2, 1 << 20), (4, 1 << 30), (3, 5_000_001)])
def test_the_three_ways_agree_where_nothing_collides(collective, processes, size):
    links = Links(processes, 20e-6, 1 / 200e9)
    closed = links.closed_form(collective, size)
    assert links.fluid(collective, size) == pytest.approx(closed, rel=1e-3)
    assert links.packets(collective, size) == pytest.approx(closed, rel=0.05)


def test_a_ring_by_hand():
    assert Links(4, 1e-5, 1e-9).closed_form("all_reduce", 4_000_000) == pytest.approx(6 * (1e-5 + 1e-3))
    assert Links(4, 1e-5, 1e-9).closed_form("all_to_all", 4_000_000) == pytest.approx(1e-5 + 3e-3)


def test_what_can_not_be_fitted_is_said():
    with pytest.raises(UsageError, match="two sizes"):
        fit(2, [1024], [1.0])
    with pytest.raises(UsageError, match="larger sizes"):
        fit(2, [1024, 2048, 4096], [1.0, 0.4, 0.2])

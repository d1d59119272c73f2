"""Schedules against their closed forms."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from luban.core.config import from_dict, to_dict
from luban.core.errors import ConfigError
from luban.optim.schedule.base import Schedule
from luban.optim.schedule.constant import Constant
from luban.optim.schedule.cosine import Cosine
from luban.optim.schedule.wsd import WarmupStableDecay


@pytest.mark.parametrize("schedule", [Cosine(warmup=7), WarmupStableDecay(warmup=7), Constant(warmup=7)])
def test_warm_up_is_a_line_to_the_peak(schedule):
    assert [schedule.factor(step, 100) for step in range(7)] == [(step + 1) / 7 for step in range(7)]


def test_cosine_follows_its_formula_between_the_end_of_warm_up_and_the_last_step():
    warmup, steps, final = random.randint(1, 20), random.randint(50, 500), random.random()
    schedule = Cosine(warmup=warmup, final=final)
    for step in range(warmup, steps):
        x = (step - (warmup - 1)) / (steps - 1 - (warmup - 1))
        assert schedule.factor(step, steps) == pytest.approx(final + (1 - final) * (1 + math.cos(math.pi * x)) / 2)
    assert schedule.factor(steps - 1, steps) == pytest.approx(final)


def test_wsd_is_flat_then_a_straight_line_to_final():
    schedule = WarmupStableDecay(warmup=5, decay=0.25, final=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert factors[4:75] == [1.0] * 71
    drops = [a - b for a, b in itertools.pairwise(factors[74:])]
    assert drops == pytest.approx([0.9 / 25] * 25)
    assert factors[-1] == pytest.approx(0.1)


def test_no_warm_up_starts_at_the_peak_and_a_single_step_run_is_defined():
    for schedule in (Cosine(warmup=0), WarmupStableDecay(warmup=0), Constant(warmup=0)):
        assert schedule.factor(0, 1000) == pytest.approx(1.0)
        assert 0 <= schedule.factor(0, 1) <= 1


def test_warm_up_longer_than_the_run_never_leaves_it():
    assert [Cosine(warmup=10).factor(step, 4) for step in range(4)] == [0.1, 0.2, 0.3, 0.4]


def test_schedules_are_chosen_by_name_and_refuse_nonsense():
    assert from_dict(Schedule, {"type": "wsd", "decay": 0.5}) == WarmupStableDecay(decay=0.5)
    assert to_dict(Cosine(warmup=3))["type"] == "cosine"
    for wrong in (
        {"type": "wsd", "decay": 0},
        {"type": "cosine", "warmup": -1},
        {"type": "cosine", "final": 2},
        {"type": "cosin"},
        {"type": "constant", "final": 0.5},
    ):
        with pytest.raises(ConfigError):
            from_dict(Schedule, wrong)

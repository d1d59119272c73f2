"""Schedules run to their end in any order of events, and cost what their papers say."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from luban.core.errors import ConfigError
from luban.core.pipeline_order import Action
from luban.planner.pipeline.gpipe import gpipe
from luban.planner.pipeline.interleaved import interleaved
from luban.planner.pipeline.one_forward_one_backward import flushed
from luban.planner.pipeline.pipedream import pipedream, staleness
from luban.planner.pipeline.timeline import timeline
from luban.planner.pipeline.zero_bubble import zero_bubble

SHAPES = [(1, 1), (1, 4), (2, 1), (2, 8), (3, 5), (4, 8), (4, 3), (8, 32)]


def check(table, processes: int, micro_batches: int, stages: int, kinds: str) -> None:
    """Every action once, in the process of its stage."""
    wanted = Counter(Action(kind, s, m) for kind in kinds for s in range(stages) for m in range(micro_batches))
    assert Counter(action for actions in table for action in actions) == wanted
    assert all(action.stage % processes == p for p, actions in enumerate(table) for action in actions)


@pytest.mark.parametrize(("processes", "micro_batches"), SHAPES)
@pytest.mark.parametrize("schedule", [gpipe, flushed])
def test_gpipe_and_1f1b_wait_as_long_and_1f1b_keeps_less(schedule, processes, micro_batches):
    table = schedule(processes, micro_batches)
    check(table, processes, micro_batches, processes, "FB")
    run = timeline(table, processes)
    assert run.bubble() == Fraction(processes - 1, micro_batches)
    stash = [micro_batches if schedule is gpipe else min(processes - p, micro_batches) for p in range(processes)]
    assert run.peak_stash() == stash


@pytest.mark.parametrize(
    ("processes", "micro_batches", "each"), [(2, 2, 2), (2, 8, 2), (4, 8, 2), (4, 8, 3), (3, 6, 4)]
)
def test_interleaving_divides_the_bubble(processes, micro_batches, each):
    table = interleaved(processes, micro_batches, each)
    check(table, processes, micro_batches, processes * each, "FB")
    run = timeline(table, processes * each)
    assert run.bubble() == Fraction(processes - 1, each * micro_batches)
    # (P − p − 1)·2 + (v − 1)·P forwards before the first backward, and one more
    most = [min((processes - p - 1) * 2 + (each - 1) * processes + 1, micro_batches * each) for p in range(processes)]
    assert run.peak_stash() == most


def test_the_published_bubbles():
    assert timeline(flushed(4, 8), 4).bubble() == Fraction("0.375")
    assert timeline(interleaved(4, 8, 2), 8).bubble() == Fraction("0.1875")
    run = timeline(gpipe(4, 8), 4)
    assert 1 - 1 / (1 + run.bubble()) == Fraction(3, 11)  # GPipe's wasted fraction (K − 1)/(M + K − 1)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (2, 4), (3, 6), (4, 8), (4, 32), (8, 16)])
def test_zero_bubble_waits_a_third_of_1f1b_in_its_memory(processes, micro_batches):
    table = zero_bubble(processes, micro_batches)
    check(table, processes, micro_batches, processes, "FIW")
    run = timeline(table, processes)
    # (P − 1)(F + I − W), 1F1B's being (P − 1)(F + I + W)
    assert run.bubble() <= Fraction(processes - 1, 3 * micro_batches)
    assert max(run.peak_stash()) <= processes
    for actions in table:  # a weight's gradient follows its input's
        place = {action: at for at, action in enumerate(actions)}
        assert all(place[a] > place[Action("I", a.stage, a.micro_batch)] for a in actions if a.kind == "W")


def test_pipedream_keeps_a_version_of_the_weights_for_every_micro_batch_in_flight():
    for processes, micro_batches in SHAPES:
        table = pipedream(processes, micro_batches)
        for p, actions in enumerate(table):
            updates, seen = 0, {}
            for action in actions:
                if action.kind == "F":
                    seen[action.micro_batch] = updates
                else:
                    updates += 1
            assert all(m - version == staleness(processes, p, m) for m, version in seen.items())


def test_a_picture_shows_who_waits():
    assert timeline(flushed(2, 2), 2).picture() == [
        "process 0   F0·F1·      B0·B0·   B1·B1·",
        "process 1      F0·B0·B0·F1·B1·B1·",
    ]


def test_what_cannot_run_is_refused():
    table = [[Action("B", 0, 0), Action("F", 0, 0)]]
    with pytest.raises(ValueError, match="can't go on"):
        timeline(table, 1)
    with pytest.raises(ConfigError, match="4 at a time"):
        interleaved(4, 6, 2)

"""Slow, silent and hanging workers and failing machines, told apart by what workers report."""

from __future__ import annotations

from luban.train.elastic.health import Beat, StepTimes, all_wait, failing_node, unwell

LIMITS = {"silent": 10.0, "hang": 100.0}


def test_a_straggler_is_named_by_medians_not_by_single_steps():
    times = StepTimes()
    for step in range(20):
        times.add("a/0", 1.0)
        times.add("a/1", 1.1)
        times.add("b/0", 1.8)
        times.add("b/1", 9.0 if step % 4 == 0 else 1.0)  # now and then slow
    assert times.stragglers() == {"b/0": 1.8}
    times.keep(["a/0", "a/1"])
    assert times.stragglers() == {}


def test_short_steps_and_few_steps_name_nobody():
    times = StepTimes()
    for _ in range(20):
        times.add("a", 0.001)
        times.add("b", 0.004)
    assert times.stragglers() == {}
    few = StepTimes()
    for _ in range(5):
        few.add("a", 1.0)
        few.add("b", 4.0)
    assert few.stragglers() == {}


def test_who_waits_for_a_hanging_worker_does_not_hang():
    beats = {
        "a": Beat(at=199, doing="communication", for_seconds=150),
        "b": Beat(at=199, doing="data", for_seconds=150),
        "c": Beat(at=185, doing="communication", for_seconds=1),
    }
    assert unwell(beats, 200, **LIMITS) == {"b": "hangs", "c": "silent"}
    assert unwell({"a": Beat(199, "compute", 98.5), "b": Beat(199, "idle", 1e6)}, 200, **LIMITS) == {}


def test_passes_that_wait_inside_are_told_apart_by_their_collectives():
    """Sharded parameters are gathered in the passes: all seem to compute, and one has not come to the collective of the others."""
    beats = {
        name: Beat(199, "compute", 150, collectives) for name, collectives in zip("abc", (41, 40, 41), strict=True)
    }
    assert unwell(beats, 200, **LIMITS) == {"b": "hangs"}


def test_lost_messages_are_seen_when_all_wait():
    waiting = {name: Beat(199, "communication", 150) for name in "ab"}
    assert all_wait(waiting, 200, 100.0) and not unwell(waiting, 200, **LIMITS)
    assert not all_wait({**waiting, "c": Beat(199, "compute", 1)}, 200, 100.0) and not all_wait({}, 200, 100.0)


def test_a_machine_fails_where_its_workers_do_and_no_others():
    limits = {"most": 3, "within": 60.0}
    assert failing_node({"a": [90, 95, 99], "b": []}, 100, **limits) == ["a"]
    assert failing_node({"a": [90, 95, 99], "b": [80]}, 100, **limits) == []  # the program, more likely
    assert failing_node({"a": [10, 95, 99], "b": []}, 100, **limits) == []
    assert failing_node({"a": [90, 95, 99]}, 100, **limits) == []  # nothing to compare with

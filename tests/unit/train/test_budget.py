"""A time budget becomes a step count once."""

from __future__ import annotations

from luban.train.budget import RESERVE, TIMED, WARM, StepCount


def test_steps_are_fixed_after_the_timed_ones_from_their_mean_with_compilation_paid_but_not_timed():
    count = StepCount(wanted=10_000, budget_seconds=100)
    elapsed, fixed = 0.0, []
    for step in range(WARM + TIMED):
        seconds = 30.0 if step == 0 else 0.5
        elapsed += seconds
        fixed.append(count.record(step, seconds, elapsed))
    assert fixed == [False] * (WARM + TIMED - 1) + [True]
    assert count.fixed == WARM + TIMED + int((100 * (1 - RESERVE) - elapsed) / 0.5)
    assert not count.record(21, 9.0, elapsed)


def test_a_resume_sees_the_same_total_at_every_step():
    live = StepCount(wanted=500, budget_seconds=10)
    before = [live.total(step) for step in range(21)]
    for step in range(21):
        live.record(step, 0.1, 0.1 * step)
    resumed = StepCount(wanted=500, budget_seconds=10, fixed=live.fixed, fixed_at=live.fixed_at)
    assert [resumed.total(step) for step in range(21)] == before
    assert [resumed.total(step) for step in range(21, 90)] == [live.fixed] * 69


def test_slow_steps_are_timed_no_longer_than_the_budget_lasts():
    """Twenty of them would take longer than the whole run may."""
    slow, elapsed, done = StepCount(wanted=500, budget_seconds=100), 0.0, 0
    while done < slow.total(done):
        elapsed += 12.0 if done == 0 else 8.0
        slow.record(done, 8.0, elapsed)
        done += 1
    assert slow.fixed_at == 4 and elapsed == 12 + 8 * 10  # the next one would end after 95 s


def test_the_budget_only_ever_lowers_the_steps_and_an_exhausted_one_stops_now():
    fast, spent = StepCount(wanted=50, budget_seconds=1e9), StepCount(wanted=50, budget_seconds=1)
    for step in range(21):
        fast.record(step, 0.1, 0.1 * step)
        spent.record(step, 10.0, 10.0 * step)
    assert fast.fixed == 50 and spent.fixed == 2
    assert StepCount(wanted=50).total(49) == 50
    assert [StepCount(wanted=50).known(0), StepCount(wanted=50, budget_seconds=9).known(0)] == [50, None]
    assert StepCount(wanted=50, budget_seconds=9, fixed=30, fixed_at=21).known(25) == 30

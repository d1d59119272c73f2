"""Rows of a step's batch: each used once, whatever dies; shares that follow speeds; plans fitted to other numbers of workers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from clock import Clock

from luban.core.plan import ParallelPlan
from luban.train.elastic.database import Events, open_database
from luban.train.elastic.membership import Membership
from luban.train.elastic.refit import keeps_parts, refit, usable_workers
from luban.train.elastic.rows import Rows
from luban.train.elastic.shares import bounds_by_speed, equal_bounds
from luban.train.elastic.wire import Refused, StaleGeneration

WORKERS, ROWS, PIECES = 3, 6, 2


class Job:
    """A service's rows for some workers."""

    def __init__(self, path, balance=False):
        self.path, self.balance, self.incarnations = path, balance, 0
        self.open()
        self.rows.membership.node("a", list(range(WORKERS)))
        self.begin()

    def open(self) -> None:
        database = open_database(self.path)
        events = Events(database, lambda: 0.0)
        membership = Membership(database, events, lambda n: n, clock=Clock())
        self.rows = Rows(database, membership, events, self.balance)

    def begin(self) -> None:
        """A generation of new processes."""
        self.incarnations += 1
        for number in range(WORKERS):
            self.rows.membership.join(f"a/{number}", str(self.incarnations), {}, 0, 1, "")

    def lose(self) -> None:
        self.rows.membership.lost("a/0", str(self.incarnations), "killed")
        self.begin()

    @property
    def generation(self) -> int:
        return self.rows.membership.generation

    def lease(self, step: int) -> list[int]:
        return self.rows.lease(self.generation, step, ROWS, PIECES)["bounds"]


def test_workers_are_told_the_same_division_however_often_they_ask(tmp_path):
    job = Job(tmp_path / "service.db")
    first = job.lease(0)
    job.open()  # the service is killed and started again
    assert job.lease(0) == first == [0, 2, 4, 6]
    with pytest.raises(Refused, match="step 2 was asked for, and the last one was 0"):
        job.lease(2)


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_used_once_whatever_dies(tmp_path, seed):
    """Workers, represented by the steps that they have a copy of, against the table of what was used."""
    draw, job = random.Random(seed), Job(tmp_path / "drawn.db")
    trained: list[int] = []  # generation that each step of the weights' history was trained by
    while len(trained) < 40:
        step = len(trained)
        match draw.choice(["train", "train", "train", "lose", "restart"]):
            case "train":
                bounds = job.lease(step)
                assert bounds[0] == 0 and bounds[-1] == ROWS and all(a < b for a, b in pairwise(bounds))
                for rank in draw.sample(range(WORKERS), draw.randint(1, WORKERS)):  # the others die before they say so
                    job.rows.done(job.generation, step, rank, 1.0)
                trained.append(job.generation)
            case "lose":
                stale = job.generation
                job.lose()
                with pytest.raises(StaleGeneration):
                    job.rows.lease(stale, step, ROWS, PIECES)
                kept = max(0, len(trained) - draw.randint(0, 2))
                undone = job.rows.resume(job.generation, kept)
                assert undone == len(trained) - kept
                del trained[kept:]
            case "restart":
                job.open()
        found = job.rows.audit()
        assert found["steps"] == len(trained) and found["rows"] == len(trained) * ROWS * PIECES and not found["wrong"]
    table = job.rows.database.execute("SELECT generation FROM steps ORDER BY step")
    assert [row["generation"] for row in table] == trained


def test_an_audit_names_a_step_that_is_missing_or_wrong(tmp_path):
    job = Job(tmp_path / "service.db")
    for step in range(6):
        job.lease(step)
    job.rows.database.execute("DELETE FROM steps WHERE step = 2")
    job.rows.database.execute("UPDATE steps SET bounds = '[0, 4, 3, 6]' WHERE step = 5")
    assert job.rows.audit()["wrong"] == [3, 5]


def test_a_run_trained_without_the_service_in_between_goes_on(tmp_path):
    """Elastic to step 5, otherwise to step 10, elastic again to 13, back to the checkpoint of step 8, and to that of step 3."""
    job = Job(tmp_path / "service.db")
    for begin, end, steps in ((0, 5, 5), (10, 13, 8), (8, 11, 8), (3, 12, 12)):
        if begin:
            job.lose()
            job.rows.resume(job.generation, begin)
        for step in range(begin, end):
            job.lease(step)
            job.open()  # the service is killed and started again
        with pytest.raises(Refused, match=f"step {end + 1} was asked for, and the last one was {end - 1}"):
            job.lease(end + 1)
        assert job.rows.audit() == {"first": 0, "steps": steps, "rows": steps * ROWS * PIECES, "wrong": []}


def test_steps_that_loaders_asked_for_and_nobody_trained_do_not_count(tmp_path):
    """Threads prepare batches ahead, beyond the end of the run."""
    job = Job(tmp_path / "service.db")
    for step in range(9):
        job.lease(step)
    assert job.rows.audit()["steps"] == 9
    for _ in range(WORKERS):  # each says so
        job.rows.trained(job.generation, 4)
    assert job.rows.audit() == {"first": 0, "steps": 4, "rows": 4 * ROWS * PIECES, "wrong": []}
    assert job.rows.last() == 3
    job.lose()
    with pytest.raises(StaleGeneration):
        job.rows.trained(job.generation - 1, 2)


def test_rows_follow_speeds(tmp_path):
    job = Job(tmp_path / "service.db", balance=True)
    assert job.lease(0) == [0, 2, 4, 6]
    for rank, seconds in enumerate((1.0, 1.0, 4.0)):
        job.rows.done(job.generation, 0, rank, seconds)
    assert job.lease(1) == [0, 3, 5, 6]  # 2.67, 2.67 and 0.67 rows, and at least one each
    job.lose()
    job.rows.resume(job.generation, 2)
    assert job.lease(2) == [0, 2, 4, 6]  # whose speeds aren't known


@pytest.mark.parametrize("seed", range(3))
def test_shares_take_as_long_as_the_best_division(seed):
    """The slowest worker's time is at most one row's above the least that any division reaches (all are tried)."""
    draw = random.Random(seed)
    rows, speeds = draw.randint(5, 9), {rank: draw.uniform(0.5, 4) for rank in range(3)}
    bounds = bounds_by_speed(rows, speeds, 3)
    given = [b - a for a, b in pairwise(bounds)]
    assert sum(given) == rows and min(given) >= 1

    def longest(shares) -> float:
        return max(share / speeds[rank] for rank, share in enumerate(shares))

    every = [(a, b, rows - a - b) for a in range(1, rows - 1) for b in range(1, rows - a)]
    assert longest(given) <= min(map(longest, every)) + 1 / min(speeds.values())


def test_nearly_equal_speeds_change_nothing():
    assert bounds_by_speed(12, {0: 1.0, 1: 1.1}, 2) == equal_bounds(12, 2) == [0, 6, 12]
    assert equal_bounds(7, 3) == [0, 3, 5, 7]


@pytest.mark.parametrize("seed", range(3))
def test_a_fitted_plan_uses_all_workers_and_no_more_memory(seed):
    draw = random.Random(seed)
    for _ in range(200):
        plan = ParallelPlan(replicate=draw.choice([1, 2, 3]), shard=draw.choice([1, 2, 4]))
        accumulate = draw.choice([1, 2, 3])
        batch = accumulate * plan.readers * draw.randint(1, 5)
        workers = usable_workers(plan, batch, draw.randint(1, 14))
        found = refit(plan, batch, accumulate, workers)
        assert found.plan.readers == found.plan.processes == workers and batch % found.accumulate == 0
        assert batch // found.accumulate >= workers  # a row for each in every micro-batch
        at_once = -(-batch // (found.accumulate * workers))
        assert at_once <= batch // (accumulate * plan.readers) or batch // found.accumulate < 2 * workers
        assert plan.shard == 1 or found.plan.shard == plan.shard or found.plan.replicate == 1


def test_the_same_number_of_workers_keeps_the_plan():
    plan = ParallelPlan(replicate=2, shard=2)
    assert refit(plan, 24, 3, 4).plan == plan and refit(plan, 24, 3, 4).accumulate == 3
    assert usable_workers(plan, 24, 7) == 6 and refit(plan, 24, 3, 6).plan == ParallelPlan(replicate=3, shard=2)
    assert refit(plan, 24, 3, 1) == refit(ParallelPlan(shard=4), 24, 3, 1)
    assert refit(ParallelPlan(replicate=4), 8, 1, 2).accumulate == 2  # still two rows at once


def test_model_and_optimizer_serve_another_number_of_replicas_but_not_a_worker_alone():
    def plan(replicate, **more):
        return ParallelPlan(replicate=replicate, **more)

    assert keeps_parts(plan(2), plan(3)) and keeps_parts(plan(3), plan(2)) and keeps_parts(plan(1), plan(1))
    assert not keeps_parts(plan(1), plan(2)) and not keeps_parts(plan(2), plan(1))
    assert not keeps_parts(plan(2, shard=2), plan(2, shard=2)) and not keeps_parts(plan(2), plan(1, shard=2))
    assert not keeps_parts(plan(2, remat="pofo"), plan(2, remat="pofo"))  # all measure together
    assert keeps_parts(plan(1, remat="pofo"), plan(1, remat="pofo"))
    assert keeps_parts(plan(2, remat="sqrt"), plan(3, remat="sqrt"))

"""Misconfigured jobs on a shared cluster, in simulation: the throughput model, the cluster's limits, and what resizing gains."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace

import pytest

from luban.cli import bench
from luban.core.errors import UsageError
from luban.planner.jobs.job import EFFICIENT, MOST_WORKERS, Job, Workload
from luban.planner.jobs.policy import MANUAL, MEASURED, Measurements
from luban.planner.jobs.results import compare_policies
from luban.planner.jobs.simulation import JobCluster, Simulation
from luban.planner.jobs.throughput import IterationTime, fit
from luban.report.jobs import distribution

FEW = Workload(jobs=24, hours=3.0)
CLUSTER = JobCluster(workers=96, memory=3000.0)


def drawn_time(draw: random.Random) -> IterationTime:
    return IterationTime(draw.uniform(0, 0.3), draw.uniform(1, 8), draw.uniform(0, 0.02))


@pytest.mark.parametrize("seed", range(5))
def test_three_sizes_without_noise_give_the_model(seed):
    time = drawn_time(random.Random(seed))
    found = fit({n: time.seconds(n) for n in (1, 4, 16)})
    for n in range(1, MOST_WORKERS + 1):
        assert found.seconds(n) == pytest.approx(time.seconds(n), rel=1e-6)
    able = [n for n in range(1, MOST_WORKERS + 1) if time.seconds(1) / time.seconds(n) / n >= EFFICIENT]
    assert time.seconds(found.right_size(EFFICIENT, MOST_WORKERS)) <= min(map(time.seconds, able)) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_grid_of_non_negative_models_fits_noisy_times_better(seed):
    draw = random.Random(seed)
    measured = {n: drawn_time(draw).seconds(n) for n in draw.sample(range(1, 20), 4)}  # of no one model

    def error(model: IterationTime) -> float:
        return sum((model.seconds(n) / seconds - 1) ** 2 for n, seconds in measured.items())

    found = fit(measured)
    assert min(found.fixed, found.divided, found.growing) >= 0
    grid = (IterationTime(a / 4, b / 2, c / 20) for a in range(9) for b in range(17) for c in range(9))
    assert error(found) <= min(map(error, grid)) + 1e-9


def test_one_size_counts_as_work_that_is_divided():
    assert fit({4: 2.0}) == IterationTime(0.0, 8.0, 0.0)


def test_memory_is_the_line_through_what_was_measured():
    shown = Measurements(memory=[(0.1, 11.0)])
    assert shown.wanted_memory(1.0) is None
    shown.memory.append((0.3, 13.0))
    assert shown.wanted_memory(1.2) == pytest.approx(1.2 * 20)


def test_a_job_alone_takes_as_long_as_arithmetic_says():
    time = IterationTime(0.1, 4.0, 0.0)
    plain = {"number": 0, "arrives": 50.0, "iterations": 1000, "time": time, "memory_start": 1.0}
    enough = Job(**plain, memory_end=8.0, workers=4, memory=9.0)
    assert Simulation([enough], CLUSTER, MANUAL).run().completion_times() == [pytest.approx(1100.0)]
    # half of its memory: full at 3 of 7 growing GB, restarted from the beginning after half an hour with twice as much
    short = Job(**plain, memory_end=8.0, workers=4, memory=4.0)
    wanted = 1100.0 * 3 / 7 + MANUAL.restart + 1100.0
    outcome = Simulation([short], CLUSTER, MANUAL).run()
    assert outcome.completion_times() == [pytest.approx(wanted)] and outcome.runs[0].failures == 1


def test_a_job_goes_back_to_its_last_checkpoint_and_no_further():
    """Full after 471.4 s; checkpoints each 100 s: the last at 400 s."""
    time = IterationTime(0.1, 4.0, 0.0)
    job = Job(
        number=0, arrives=0.0, iterations=1000, time=time, memory_start=1.0, memory_end=8.0, workers=4, memory=4.0
    )
    policy = replace(MANUAL, checkpoint=100.0)
    wanted = 1100.0 * 3 / 7 + policy.restart + 1100.0 - 400.0
    assert Simulation([job], CLUSTER, policy).run().completion_times() == [pytest.approx(wanted)]
    # twice out of memory, the second time 1100·(3/7·2 + 1/7 − 3/7) s in: what the first attempt saved is kept
    little = replace(job, memory=2.0)
    first, second = 1100 / 7, 1100 * 3 / 7
    wanted = (
        first + policy.restart + (second - 100.0) + policy.restart + 1100.0 - (100.0 + (second - 100.0) // 100 * 100)
    )
    assert Simulation([little], CLUSTER, policy).run().completion_times() == [pytest.approx(wanted)]


def test_a_job_that_would_never_fit_is_refused():
    plain = {"number": 0, "arrives": 0.0, "iterations": 10, "time": IterationTime(0.1, 4.0, 0.0), "memory_start": 1.0}
    job = Job(**plain, memory_end=CLUSTER.memory + 1, workers=1, memory=1.0)
    with pytest.raises(UsageError, match="never end"):
        Simulation([job], CLUSTER, MANUAL)


def test_jobs_wait_for_room_in_their_order():
    time = IterationTime(0.0, 1.0, 0.0)
    plain = {"iterations": 100, "time": time, "memory_start": 1.0, "memory_end": 1.0, "memory": 2.0}
    jobs = [Job(**plain, number=n, arrives=n / 2, workers=size) for n, size in enumerate((64, 64, 1))]
    times = Simulation(jobs, CLUSTER, MANUAL).run().completion_times()
    # the third would fit beside the first, and waits behind the second
    assert times == [pytest.approx(each) for each in (100 / 64, 2 * 100 / 64 - 0.5, 100 / 64 + 100 - 1)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("policy", [MANUAL, MEASURED])
def test_every_job_is_done_within_the_clusters_limits(seed, policy):
    jobs = Workload(jobs=24, hours=3.0, seed=seed).draw()
    outcome = Simulation(jobs, CLUSTER, policy, seed).run()
    assert len(outcome.completion_times()) == len(jobs)
    assert outcome.most_workers <= CLUSTER.workers and outcome.most_memory <= CLUSTER.memory + 1e-6
    for run in outcome.runs:
        best = min(run.job.time.seconds(n) for n in range(1, MOST_WORKERS + 1))
        assert run.finished is not None and run.finished - run.job.arrives >= run.job.iterations * best * (1 - 1e-9)


def test_resizing_helps_wrong_requests_and_hardly_hurts_right_ones():
    wrong = compare_policies(Workload(jobs=40, hours=4.0), CLUSTER, 2)
    assert wrong[1].mean_hours < 0.75 * wrong[0].mean_hours and wrong[1].median_hours < 0.75 * wrong[0].median_hours
    right = compare_policies(Workload(jobs=40, hours=4.0, spread=0.0, memory_spread=0.0), CLUSTER, 2)
    assert right[1].mean_hours < 1.15 * right[0].mean_hours


def test_the_command_draws_the_distribution(tmp_path, capsys):
    words = ["jobs", "--jobs", "12", "--hours", "2", "--seeds", "1"]
    assert not bench.run([*words, "--out", str(tmp_path / "page.html"), "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert "as requested" in said and "as measured" in said and "completion times: mean" in said
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(each["hours"]) for each in found] == [12, 12]
    assert found[0]["mean_hours"] == pytest.approx(statistics.fmean(found[0]["hours"]))
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="curve') == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert distribution([2.0, 1.0]) == [(1.0, 0.5), (2.0, 1.0)]
    with pytest.raises(UsageError, match="must be at least 1"):
        bench.run(["jobs", "--jobs", "0"])

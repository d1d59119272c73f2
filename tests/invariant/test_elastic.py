"""Elastic runs whose workers and service are killed, stopped, joined and left: the samples, weights and curve of a run that
nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
import warm

from luban.cli.training import RECIPES
from luban.core.arguments import parse_recipe
from luban.core.artifact import open_artifact
from luban.core.errors import ConfigError, LubanError
from luban.train.elastic.agent import Agent, folder_of
from luban.train.elastic.processes import Process
from luban.train.elastic.service import ADDRESS
from luban.train.elastic.shared_memory import flash_base
from luban.train.elastic.start import agent_of
from luban.train.elastic.wire import Client
from luban.train.goodput import KINDS
from luban.train.recipe import Recipe

STEPS, BATCH = 24, 14  # which three workers divide unevenly
WORDS = ("--train.batch_size", BATCH, "--train.steps", STEPS, "--checkpoint.every", 10, "--validation.every", 12)
WORDS += ("--train.precision", "fp64")
PATIENCE = 120.0  # seconds that a test waits for anything


class Job:
    """An elastic run that a test does things to.

    Args:
        words: further words of the command line.
        node: of the agent.
    """

    def __init__(self, recipe: Path, shards: Path, out: Path, *words: object, workers: int = 2, node: str = "here"):
        self.out, self.log, self.folder = out, out.with_suffix(f".{node}.log"), folder_of(out)
        given = [*WORDS, "--elastic.enabled", "true", "--elastic.spares", "0", "--elastic.node", node, *words]
        line = [str(word) for word in (recipe, "--data.path", shards, "--out", out, *given)]
        call = parse_recipe(Recipe, line, verb="pretrain", about="", examples="", shipped=RECIPES)
        self.agent: Agent = agent_of(call.recipe, out, ["pretrain", *line], workers, self._start)
        self.client = Client(self.folder / ADDRESS, patience=PATIENCE)
        self.failures: list[BaseException] = []

    def _start(self, words, environment):
        return warm.Child(words, {**environment, "OMP_NUM_THREADS": "1"}, self.log)

    def run(self, act: Callable[[Job], None] | None = None) -> dict:
        """Run to the end while `act` does something in a thread; returns the manifest's figures."""
        thread = threading.Thread(target=self._act, args=(act,)) if act else None
        if thread:
            thread.start()
        try:
            code = self.agent.run()
        finally:
            if thread:
                thread.join()
            self.client.close()
            self.agent.service.client.close()
        if self.failures:
            raise self.failures[0]
        assert code == 0, self.log.read_text()
        return open_artifact(self.out, "run").figures

    def _act(self, act: Callable[[Job], None]) -> None:
        try:
            act(self)
        except BaseException as failure:
            self.failures.append(failure)

    def wait_for(self, step: int) -> None:
        """Until some worker has begun a step."""
        self.wait_until(lambda status: (status["step"] or 0) >= step)

    def wait_until(self, holds: Callable[[dict], bool]) -> None:
        """Until the service's status is such."""
        deadline = time.monotonic() + PATIENCE
        while not holds(self.client("status", since=0)):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self, file: str, number: int = signal.SIGKILL) -> None:
        found = json.loads((self.folder / file).read_text())
        Process(found["pid"], found["started"]).signal(number)


PLANS = ("replicate", pytest.param("shard", marks=pytest.mark.slow))


def words_of(plan: str) -> list[str]:
    return ["--plan.shard", "2"] if plan == "shard" else []


@pytest.fixture(scope="module")
def calm(luban, recipe, shards, tmp_path_factory) -> Callable[[str], Path]:
    """`calm(plan)` is the run of two processes without anything elastic that nothing happens to."""

    @cache
    def run(plan: str) -> Path:
        out = tmp_path_factory.mktemp("calm") / "run"
        command = ("pretrain", recipe, "--data.path", shards, "--out", out, "--nproc", 2, *WORDS, *words_of(plan))
        code, err = luban(*command)
        assert code == 0, err
        return out

    return run


def curve(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def check(figures: dict, run: Path, undisturbed: Path) -> None:
    """The same weights and curve; every row of every step was used once, and every second is accounted for."""
    assert figures["weights_hash"] == open_artifact(undisturbed, "run").figures["weights_hash"]
    assert curve(run) == curve(undisturbed)
    rows, goodput = figures["elastic"]["rows"], figures["goodput"]
    assert rows == {"first": 0, "steps": STEPS, "rows": STEPS * BATCH, "wrong": []}
    assert sum(goodput[kind] for kind in KINDS) == pytest.approx(goodput["wall"])


@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_stopped_workers_and_a_killed_service_change_nothing(calm, recipe, shards, tmp_path, plan):
    def act(job: Job) -> None:
        job.wait_for(4)
        job.kill("worker-here-1.json")
        job.wait_for(9)
        job.kill("service.pid.json")
        job.wait_for(13)
        job.kill("worker-here-0.json", signal.SIGSTOP)

    ahead = ("--data.workers", "2")  # threads that ask for rows of later steps
    job = Job(recipe, shards, tmp_path / "run", *words_of(plan), *ahead, "--elastic.silent_seconds", "2")
    figures = job.run(act)
    check(figures, job.out, calm(plan))
    assert figures["elastic"]["lost_workers"] == 2 and figures["elastic"]["generations"] == 3
    assert figures["goodput"]["lost"] > 0


def joined(job: Job, node: str) -> warm.Child:
    """The agent of another machine with one worker, which joins `job`. A worker of it is stopped until the other has started, so
    that steps remain for each number of workers."""
    generation = job.client("status", since=0)["generation"]
    job.kill("worker-one-0.json", signal.SIGSTOP)
    given = [*job.agent.words, "--elastic.node", node, "--nproc", "1"]
    agent = warm.Child(["-m", "luban", *given], {**os.environ, "OMP_NUM_THREADS": "1"}, job.log)
    job.wait_until(lambda status: f"{node}/0" in status["waiting"])
    at = job.client("status", since=0)["step"]
    job.kill("worker-one-0.json", signal.SIGCONT)
    job.wait_until(lambda status: status["generation"] == generation + 1 and status["step"] > at + 2)
    return agent


def leaves(job: Job, agent: warm.Child) -> None:
    """The machine of `agent` leaves `job`, a worker of which is stopped meanwhile."""
    job.kill("worker-one-0.json", signal.SIGSTOP)
    os.kill(agent.pid, signal.SIGTERM)
    job.wait_until(lambda status: status["nodes"] == ["one"])
    job.kill("worker-one-0.json", signal.SIGCONT)


def check_resized(figures: dict, job: Job, undisturbed: Path, shares: list[str]) -> None:
    """The same curve but for rounding; every row of every step was used once, by workers with these shares one after the other."""
    rows = figures["elastic"]["rows"]
    assert rows["steps"] == STEPS and rows["rows"] == STEPS * BATCH and not rows["wrong"]
    found, right = curve(job.out), curve(undisturbed)
    assert [v for row in found for v in row] == pytest.approx([v for row in right for v in row], rel=1e-9)
    with closing(sqlite3.connect(job.folder / "service.db")) as database:
        bounds = [bounds for (bounds,) in database.execute("SELECT bounds FROM steps ORDER BY step")]
    assert [share for share, _ in groupby(bounds)] == shares


@pytest.mark.parametrize("plan", PLANS)
def test_a_machine_joins_and_leaves_at_the_same_global_batch(calm, recipe, shards, tmp_path, plan):
    def act(job: Job) -> None:
        job.wait_for(2)
        leaves(job, joined(job, "two"))

    job = Job(recipe, shards, tmp_path / "run", *words_of(plan), "--elastic.silent_seconds", "60", node="one")
    check_resized(job.run(act), job, calm(plan), ["[0, 7, 14]", "[0, 5, 10, 14]", "[0, 7, 14]"])


def test_a_run_of_one_worker_grows_and_shrinks(calm, recipe, shards, tmp_path):
    """A worker that was alone sums no gradients; beside others it must, as those do."""

    def act(job: Job) -> None:
        job.wait_for(1)
        leaves(job, joined(job, "two"))
        at = job.client("status", since=0)["step"]
        job.wait_until(lambda status: status["generation"] == 3 and status["step"] > at)
        joined(job, "three")

    words = ("--elastic.silent_seconds", "60")
    job = Job(recipe, shards, tmp_path / "run", *words, workers=1, node="one")
    alone, both = "[0, 14]", "[0, 7, 14]"
    check_resized(job.run(act), job, calm("replicate"), [alone, both, alone, both])
    assert "1 worker goes on after step" in job.log.read_text()


@pytest.mark.slow
def test_the_same_command_takes_over_from_a_killed_agent(calm, start, recipe, shards, tmp_path):
    out = tmp_path / "run"
    words = (*WORDS, "--elastic.enabled", "true", "--elastic.node", "here", "--elastic.spares", "0")
    words += ("--elastic.silent_seconds", "60")
    command = ("pretrain", recipe, "--data.path", shards, "--out", out, "--nproc", 2, *words)
    first = start(*command, environment={"OMP_NUM_THREADS": "1"})
    job = Job(recipe, shards, out)
    while not job.client.address.exists():
        time.sleep(0.01)
    job.wait_for(4)
    pids = [json.loads((job.folder / f"worker-here-{n}.json").read_text())["pid"] for n in (0, 1)]
    job.kill("worker-here-0.json", signal.SIGSTOP)  # so that steps remain
    first.kill()
    job.kill("worker-here-1.json")  # while no agent is there
    job.kill("worker-here-0.json", signal.SIGCONT)
    second = start(*command, environment={"OMP_NUM_THREADS": "1"})
    printed, err = second.communicate(timeout=300)
    assert second.returncode == 0 and printed.strip() == str(out), err
    assert "worker here/0 goes on" in err
    assert json.loads((job.folder / "worker-here-0.json").read_text())["pid"] == pids[0]
    check(open_artifact(out, "run").figures, out, calm("replicate"))


@pytest.mark.slow
def test_a_worker_with_another_recipe_is_refused_by_name_and_the_run_goes_on(calm, recipe, shards, tmp_path):
    out, said = tmp_path / "run", tmp_path / "other.log"
    first = Job(recipe, shards, out, "--elastic.silent_seconds", "60", node="one")

    def act(job: Job) -> None:
        job.wait_for(2)
        job.kill("worker-one-0.json", signal.SIGSTOP)  # so that the run lasts until the other has started
        words = Job(recipe, shards, out, "--train.seed", 7, workers=1, node="two").agent.words
        other = warm.Child(["-m", "luban", *words], {**os.environ, "OMP_NUM_THREADS": "1"}, said)
        deadline = time.monotonic() + PATIENCE
        while other.poll() is None:
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        job.kill("worker-one-0.json", signal.SIGCONT)
        assert other.poll() == 1

    figures = first.run(act)
    differs = "worker two/0 is refused, since it has another recipe than this run (train.seed is 7 instead of"
    assert said.read_text().count(differs) == said.read_text().count("train.seed") == 1
    check(figures, out, calm("replicate"))


def test_what_cannot_be_elastic_is_refused_before_anything_starts(recipe, shards, tmp_path):
    for words, message in (
        (("--plan.tensor", "2"), "leave plan.tensor at 1"),
        (("--spikes.action", "skip"), "spikes.action skip"),
        (("--elastic.min_workers", "0"), "elastic.min_workers must be at least 1, 0 given"),
        (("--elastic.node", "a/b"), r"elastic.node may have letters, digits, .*'a/b' given"),
        (("--elastic.node", ".."), r"does not begin with '\.': '\.\.' given"),
        (("--elastic.flash_folder", tmp_path / "none"), "flash_folder .*none is not a folder"),
        (("--train.batch_size", "1"), "2 workers need a row each, and train.batch_size is 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Job(recipe, shards, tmp_path / "run", *words)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_says_why_once_and_leaves_no_memory_behind(recipe, shards, tmp_path):
    """Every worker meets the same numbers that aren't finite."""
    job = Job(recipe, shards, tmp_path / "run", "--optim.lr", "1e30", "--train.max_bad_steps", "2", "--train.clip", "0")
    with pytest.raises(LubanError, match="steps were NaN or infinite"):
        job.run()
    base = flash_base(job.agent.elastic.flash_folder, job.out)  # makes it anew
    assert not list(base.iterdir())
    base.rmdir()

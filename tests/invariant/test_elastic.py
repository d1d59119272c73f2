"""Elastic runs whose workers and service are killed, stopped, joined and left: the samples, weights and curve of a run that
nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
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
from luban.train.elastic.start import agent_of
from luban.train.elastic.wire import Client
from luban.train.goodput import KINDS
from luban.train.recipe import Recipe

STEPS, BATCH = 24, 12
WORDS = ("--train.batch_size", BATCH, "--train.steps", STEPS, "--checkpoint.every", 10, "--validation.every", 12)
PATIENCE = 120.0  # seconds that a test waits for anything


class Job:
    """An elastic run that a test does things to.

    Args:
        words: further words of the command line.
        node: of the agent.
    """

    def __init__(self, recipe: Path, shards: Path, out: Path, *words: object, workers: int = 2, node: str = "here"):
        self.out, self.log, self.folder = out, out.with_suffix(f".{node}.log"), folder_of(out)
        given = [*WORDS, *words, "--elastic.enabled", "true", "--elastic.spares", "0", "--elastic.node", node]
        line = [str(word) for word in (recipe, "--data.path", shards, "--out", out, *given)]
        call = parse_recipe(Recipe, line, verb="pretrain", about="", examples="", shipped=RECIPES)
        self.agent: Agent = agent_of(call.recipe, out, ["pretrain", *line], workers)
        self.agent.start = partial(self._start)
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
            self.agent.client.close()
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
        deadline = time.monotonic() + PATIENCE
        while (self.client("status", since=0)["step"] or 0) < step:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self, file: str, number: int = signal.SIGKILL) -> None:
        found = json.loads((self.folder / file).read_text())
        Process(found["pid"], found["started"]).signal(number)

    def curve(self) -> list[tuple[int, float, float]]:
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module", params=["replicate", "shard"])
def calm(request, recipe, shards, tmp_path_factory) -> tuple[list[str], Job, dict]:
    """(words of the plan, an elastic run that nothing happens to, its figures)."""
    plan = ["--plan.shard", "2"] if request.param == "shard" else []
    job = Job(recipe, shards, tmp_path_factory.mktemp("calm") / "run", *plan)
    return plan, job, job.run()


def check_rows(figures: dict) -> None:
    """Every row of every step was used once, and every second is accounted for."""
    rows, goodput = figures["elastic"]["rows"], figures["goodput"]
    assert rows == {"first": 0, "steps": STEPS, "rows": STEPS * BATCH, "wrong": []}
    assert sum(goodput[kind] for kind in KINDS) == pytest.approx(goodput["wall"])


def test_killed_workers_and_services_change_nothing(calm, recipe, shards, tmp_path):
    plan, undisturbed, wanted = calm

    def act(job: Job) -> None:
        for step, file in ((5, "worker-here-1.json"), (10, "service.pid.json"), (13, "worker-here-0.json")):
            job.wait_for(step)
            job.kill(file)

    job = Job(recipe, shards, tmp_path / "run", *plan)
    figures = job.run(act)
    assert figures["weights_hash"] == wanted["weights_hash"] and job.curve() == undisturbed.curve()
    assert figures["elastic"]["lost_workers"] == 2 and figures["elastic"]["generations"] == 3
    assert figures["goodput"]["lost"] > 0 and wanted["goodput"]["lost"] == 0
    check_rows(figures)
    check_rows(wanted)


def test_an_elastic_run_is_the_run_of_as_many_processes(calm, luban, recipe, shards, tmp_path):
    plan, _, wanted = calm
    if plan:
        pytest.skip("several processes are started once")
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--nproc", 2, *WORDS)
    assert code == 0, err
    assert open_artifact(tmp_path / "run", "run").figures["weights_hash"] == wanted["weights_hash"]


def test_a_worker_that_is_stopped_or_hangs_is_replaced(recipe, shards, tmp_path, calm):
    plan, undisturbed, wanted = calm
    if plan:
        pytest.skip("once")

    def act(job: Job) -> None:
        job.wait_for(6)
        job.kill("worker-here-1.json", signal.SIGSTOP)

    job = Job(recipe, shards, tmp_path / "run", "--elastic.silent_seconds", "2")
    figures = job.run(act)
    assert figures["weights_hash"] == wanted["weights_hash"] and job.curve() == undisturbed.curve()
    check_rows(figures)


def test_a_machine_joins_and_leaves_at_the_same_global_batch(recipe, shards, tmp_path, calm):
    plan, undisturbed, _ = calm
    if plan:
        pytest.skip("once")
    out = tmp_path / "run"
    first = Job(recipe, shards, out, "--train.precision", "fp64", workers=1, node="one")
    alone = Job(recipe, shards, tmp_path / "alone", "--train.precision", "fp64", workers=1)
    alone.run()

    def act(job: Job) -> None:
        job.wait_for(2)
        words = Job(recipe, shards, out, "--train.precision", "fp64", workers=2, node="two").agent.words
        second = warm.Child(["-m", "luban", *words, "--nproc", "2"], {**os.environ, "OMP_NUM_THREADS": "1"}, job.log)
        deadline = time.monotonic() + PATIENCE
        while job.client("status", since=0)["generation"] < 2:
            assert time.monotonic() < deadline, job.log.read_text()
            time.sleep(0.01)
        step = job.client("status", since=0)["step"]
        job.wait_for(min(step + 3, STEPS - 2))
        os.kill(second.pid, signal.SIGTERM)

    figures = first.run(act)
    rows = figures["elastic"]["rows"]
    assert rows["steps"] == STEPS and rows["rows"] == STEPS * BATCH and not rows["wrong"]
    found, right = first.curve(), alone.curve()
    assert [v for row in found for v in row] == pytest.approx([v for row in right for v in row], rel=1e-9)
    assert figures["elastic"]["generations"] >= 2


def test_what_cannot_be_elastic_is_refused_before_anything_starts(recipe, shards, tmp_path):
    for words, message in (
        (("--plan.tensor", "2"), "leave plan.tensor at 1"),
        (("--spikes.action", "skip"), "spikes.action skip"),
        (("--elastic.min_workers", "0"), "elastic.min_workers must be at least 1, 0 given"),
        (("--elastic.node", "a/b"), "a name without /"),
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
    assert not list(Path("/dev/shm").glob(f"luban-*/{job.agent.node}"))

"""The messages of a plan, measured one by one and predicted, on the run's page."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm

from luban.core.artifact import read_manifest
from luban.core.plan import ParallelPlan
from luban.models.describe import describe
from luban.models.spec import uniform
from luban.parallel.world import World
from luban.planner.collective_times import Links, fit
from luban.planner.distribution import Distribution
from luban.planner.traffic import Spread
from luban.report.predicted_vs_measured import predicted_vs_measured
from luban.train import messages
from luban.train.messages import measured_messages

PLAN = ParallelPlan(shard=2, replicate=2, zero=2)


def rows_of(plan: ParallelPlan) -> list[dict]:
    graph = describe(uniform(vocab_size=500, width=64, layers=2), batch=1, seq=32)
    return [asdict(row) for row in Distribution(Spread(graph, plan, 1, 4)).traffic()]


def steady(processes: int, sizes: list[int], seconds: list[float]) -> Links:
    """In the place of a fit to times of a machine that may be busy."""
    assert len(sizes) == len(seconds) == 3 and min(seconds) > 0
    return Links(processes, 1e-5, 1e-9)


def unfit(processes: int, sizes: list[int], seconds: list[float]) -> Links:
    """As where larger messages were faster."""
    return fit(processes, sizes, [1 / size for size in sizes])


def worker(rank: int, folder: str, fitted: str) -> None:
    messages.fit = steady if fitted == "steady" else unfit
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="4", RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    device = torch.device("cpu")
    found = measured_messages(World.join(PLAN, device), rows_of(PLAN), device)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_every_collective_of_a_plan_is_measured_among_its_own_processes(tmp_path):
    warm.processes(worker, 4, str(tmp_path), "steady")
    first, *others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4))
    graph = describe(uniform(vocab_size=500, width=64, layers=2), batch=1, seq=32)
    whole = 4 * graph.parameters
    found = {(row["axis"], row["collective"]): row for row in first}
    assert set(found) == {("replicate", "all-reduce"), ("shard", "all-gather"), ("shard", "all-to-all")}
    for (axis, _), row in found.items():
        assert row["processes"] == 2 and row["measured"] > 0
        assert row["bytes"] == pytest.approx(whole / 2 if axis == "replicate" else whole, abs=64)
        assert min(row["closed form"], row["fluid"], row["packets"]) > 0
    for other in others:  # the first process predicts for all
        assert [(row["axis"], row["bytes"]) for row in other] == [(row["axis"], row["bytes"]) for row in first]
    lines = predicted_vs_measured({"messages": first}, [])
    assert len(lines) == 3 and all("closed form" in said and "packets" in said for _, said, _ in lines)


def test_messages_are_measured_where_their_times_fit_no_bandwidth(tmp_path):
    warm.processes(worker, 4, str(tmp_path), "unfit")
    for rank in range(4):
        rows = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [row["axis"] for row in rows] == ["replicate", "shard", "shard"]
        assert all(row["measured"] > 0 and "closed form" not in row for row in rows)
    assert all(said == "" and "ms" in took for _, said, took in predicted_vs_measured({"messages": rows}, []))


@pytest.mark.slow
def test_a_profiled_run_of_two_processes_has_them_in_its_manifest(luban, shards, recipe, tmp_path):
    words = ("--nproc", "2", "--plan.shard", "2", "--train.profile", "1")
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", *words)
    assert code == 0, err
    rows = read_manifest(tmp_path / "run").figures["messages"]
    assert {(row["axis"], row["collective"]) for row in rows} == {("shard", "all-gather"), ("shard", "reduce-scatter")}

"""Training through the command line: what must be equal is equal, what must stop stops."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from drawn import drawn
from safetensors.torch import load_file

from luban.core.artifact import open_artifact

CALLS_OF_FOUR_STEPS = 26_000  # of Python functions; all but 3,000 of them save the checkpoint
COMPILED = ("--train.compile", "true", "--train.steps", "24")


def figures(run: Path) -> dict:
    return open_artifact(run, "run").figures


def weights(run: Path) -> dict:
    return load_file(run / "checkpoints" / figures(run)["checkpoints"]["last"] / "model.safetensors")


def rows(out: Path) -> list[dict]:
    file = out.with_name(out.name + ".incomplete") / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.fixture(scope="session")
def uninterrupted(luban, shards, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", out)
    assert code == 0, err
    return out


def test_a_finished_run_is_whole_and_neither_trained_again_nor_overwritten(luban, shards, recipe, uninterrupted):
    found = figures(uninterrupted)
    logged = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in logged if "loss" in row]
    assert steps == list(range(1, 61))
    losses = [row["loss"] for row in logged if "loss" in row]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.5
    assert [row["step"] for row in logged if "bits_per_byte" in row] == [20, 40, 60]
    assert all({"tokens", "tokens_per_second", "lr", "grad_norm", "seconds"} <= set(r) for r in logged if "loss" in r)
    assert found["checkpoints"]["last"] == "step_000060" and len(found["weights_hash"]) == 64
    assert 2 <= len(list((uninterrupted / "checkpoints").iterdir())) <= 3  # the last two, and the best
    assert (uninterrupted / "tokenizer" / "tokenizer.json").is_file()
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", uninterrupted)
    assert code == 0 and "is finished: nothing is left to train" in err
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", uninterrupted, "--optim.lr", "5e-4")
    assert code == 1 and "is a finished run of another configuration (config.optim.lr was 0.001, now 0.0005)" in err
    assert "Traceback" not in err and figures(uninterrupted) == found


def kill_and_resume(start, luban, command, out: Path, seed: int, steps: int) -> None:
    """Kill the command at two seeded moments of its work, then let it finish."""
    draw = random.Random(seed)
    for at in sorted(draw.sample(range(1, steps - 8), 2)):
        process = start(*command, "--out", out, signalled=(at, draw.randrange(CALLS_OF_FOUR_STEPS), signal.SIGKILL))
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL and not out.exists(), err
    code, err = luban(*command, "--out", out)
    assert code == 0 and "resuming after step" in err, err


@pytest.mark.parametrize("seed", drawn(range(12), 1))
def test_killed_at_random_and_resumed_equals_uninterrupted_on_any_number_of_workers(
    start, luban, shards, recipe, uninterrupted, tmp_path, seed
):
    command = ("pretrain", recipe, "--data.path", shards, "--data.workers", (1, 4, 2)[seed % 3])
    kill_and_resume(start, luban, command, tmp_path / "run", seed, 60)
    assert figures(tmp_path / "run")["weights_hash"] == figures(uninterrupted)["weights_hash"]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bitwise_with_compile_accumulation_and_mixed_precision(
    start, luban, shards, recipe, tmp_path, precision
):
    command = (
        "pretrain",
        recipe,
        "--data.path",
        shards,
        *COMPILED,
        "--train.accumulate",
        "2",
        "--train.precision",
        precision,
        "--optim.type",
        "muon",
    )
    code, err = luban(*command, "--out", tmp_path / "whole")
    assert code == 0, err
    kill_and_resume(start, luban, command, tmp_path / "killed", 5, 24)
    assert figures(tmp_path / "killed")["weights_hash"] == figures(tmp_path / "whole")["weights_hash"]


def test_accumulation_equals_the_larger_batch(luban, shards, recipe, tmp_path):
    # a large eps keeps Adam's update smooth where gradients are near 0, so that rounding stays rounding
    smooth = ("--optim.eps", "1e-3", "--train.steps", "20")
    for name, accumulate in (("whole", 1), ("cut", 4)):
        code, err = luban(
            "pretrain",
            recipe,
            "--data.path",
            shards,
            "--out",
            tmp_path / name,
            *smooth,
            "--train.accumulate",
            accumulate,
        )
        assert code == 0, err
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    difference = max(float((whole[name] - cut[name]).abs().max()) for name in whole)
    assert 0 < difference < 2e-5  # 20 updates of at most lr = 1e-3, each off by fp32 rounding of its gradient


@pytest.mark.parametrize(
    ("number", "exit_code"), drawn([(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], 1)
)
def test_signals_save_and_a_damaged_checkpoint_falls_back_to_the_one_before(
    start, luban, shards, recipe, uninterrupted, tmp_path, number, exit_code
):
    out = tmp_path / "run"
    process = start("pretrain", recipe, "--data.path", shards, "--out", out, signalled=(13, 100, number))
    _, err = process.communicate()
    assert process.returncode == exit_code and "the same command resumes" in err and "Traceback" not in err
    checkpoints = sorted((tmp_path / "run.incomplete" / "checkpoints").iterdir())
    assert int(checkpoints[-1].name.removeprefix("step_")) == rows(out)[-1]["step"]  # saved after the running step
    file = checkpoints[-1] / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", out)
    assert code == 0 and f"{checkpoints[-1].name} is damaged" in err
    assert f"resuming after step {int(checkpoints[-2].name.removeprefix('step_'))}" in err
    assert figures(out)["weights_hash"] == figures(uninterrupted)["weights_hash"]
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--train.seed", "1")
    assert code == 1


def test_a_reader_that_goes_away_ends_no_training(start, shards, recipe, uninterrupted, tmp_path):
    """As `luban pretrain … 2>&1 | head -1` does."""
    process = start("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run")
    process.stdout.close()
    process.stderr.readline()
    process.stderr.close()
    assert process.wait() == 0
    assert figures(tmp_path / "run")["weights_hash"] == figures(uninterrupted)["weights_hash"]


def test_an_unfinished_run_of_another_configuration_is_refused(start, luban, shards, recipe, tmp_path):
    out = tmp_path / "run"
    start("pretrain", recipe, "--data.path", shards, "--out", out, signalled=(1, 100, signal.SIGKILL)).communicate()
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", out, "--optim.lr", "5e-4")
    assert code == 1 and "optim.lr was 0.001, now 0.0005" in err


def test_divergence_stops_with_the_reason_and_the_last_good_checkpoint(luban, shards, recipe, tmp_path):
    code, err = luban(
        "pretrain",
        recipe,
        "--data.path",
        shards,
        "--out",
        tmp_path / "run",
        "--optim.lr",
        "1e25",
        "--schedule.warmup",
        "0",
        "--checkpoint.every",
        "1",
        "--train.max_bad_steps",
        "3",
    )
    assert code == 1 and "3 steps were NaN or infinite" in err and "Traceback" not in err
    last = sorted((tmp_path / "run.incomplete" / "checkpoints").iterdir())[-1]
    assert last.name in err and not (tmp_path / "run").exists()


def test_a_full_disk_leaves_nothing_that_passes_for_finished(luban, shards, recipe, tmp_path):
    out = tmp_path / "run"
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", out, file_size=60_000)
    assert code == 1 and "Traceback" not in err and "model.safetensors" in err
    assert not out.exists()
    checkpoints = tmp_path / "run.incomplete" / "checkpoints"
    assert not checkpoints.exists() or not [p for p in checkpoints.iterdir() if not p.name.endswith(".incomplete")]
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", out)
    assert code == 0, err  # with room again the same command finishes

"""Runs of several processes through the command line: the same curve, one that stops and goes on under another plan."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from training_data import write_conversations

from luban.checkpoint.manager import CheckpointManager
from luban.checkpoint.reader import CheckpointReader
from luban.cli import pretrain
from luban.core.artifact import open_artifact
from luban.core.errors import UsageError
from luban.train.elastic.claim import VARIABLE

DOUBLE = ("--train.precision", "fp64", "--train.steps", "24", "--checkpoint.every", "8")


def curve(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = open_artifact(run, "run").figures["checkpoints"]["last"]
    return dict(CheckpointReader.open(run / "checkpoints" / last).tensors("model"))


def test_a_run_that_stops_in_two_processes_goes_on_in_two_others(luban, start, shards, recipe, tmp_path):
    single, several = tmp_path / "single", tmp_path / "several"
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", single, *DOUBLE)
    assert code == 0, err
    command = ("pretrain", recipe, "--data.path", shards, "--out", several, *DOUBLE)
    process = start(*command, "--nproc", "2", "--plan.shard", "2")
    log = tmp_path / "several.incomplete" / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"loss"') < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert err.count("the same command resumes") == 1  # one process speaks for all
    code, err = luban(*command, "--nproc", "2", "--plan.tensor", "2")
    assert code == 0 and "plan.shard was 2, now 1" in err and "plan.tensor was 1, now 2" in err, err
    assert "resuming after step" in err, err
    found, right = curve(several), curve(single)
    assert [row[0] for row in found] == [row[0] for row in right]
    assert [v for row in found for v in row[1:]] == pytest.approx([v for row in right for v in row[1:]], rel=1e-9)
    wanted = weights(single)
    for name, tensor in weights(several).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_instruction_tuning_in_two_processes_equals_one(luban, shards, recipe, tmp_path):
    """The conversations are packed once, and answers are counted over both processes."""
    base, talk = tmp_path / "base", write_conversations(tmp_path / "talk.jsonl")
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", base, "--train.steps", "2")
    assert code == 0, err
    tuning = tmp_path / "tuning.toml"
    tuning.write_text(recipe.read_text().split("[schedule]")[1].join(["[schedule]", ""]))
    command = ("sft", tuning, "--init", base, "--data.path", talk, "--train.precision", "fp64", "--train.steps", "8")
    settings = ("--train.accumulate", "2", "--validation.every", "0", "--train.seq_len", "64")
    for name, words in (("one", ()), ("two", ("--nproc", "2", "--plan.shard", "2"))):
        code, err = luban(*command, *settings, "--out", tmp_path / name, *words)
        assert code == 0 and err.count("What is trained on stands between") == 1, err
    found, right = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [v for row in found for v in row] == pytest.approx([v for row in right for v in row], rel=1e-9)


@pytest.mark.slow
def test_preferences_in_two_processes_equal_one(luban, shards, recipe, tmp_path):
    """`reward` and `dpo`: the data is packed once, one process measures, and a mistake is said once, before any starts."""
    base, pairs = tmp_path / "base", tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": "a" * (2 + i % 3), "rejected": "z" * (2 + i % 2)} for i in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", base, "--train.steps", "2")
    assert code == 0, err
    settings = ("--train.precision", "fp64", "--train.steps", "4", "--train.batch_size", "4", "--train.seq_len", "64")
    for verb in ("reward", "dpo"):
        command = (verb, f"luban_{verb}_cpu", "--init", base, "--data.path", pairs, *settings, "--train.log_every", "1")
        for name, words in (("one", ()), ("two", ("--nproc", "2", "--plan.shard", "2"))):
            code, err = luban(*command, "--out", tmp_path / f"{verb}-{name}", *words)
            assert code == 0 and err.count("packing ") == 1, err
            references = list(tmp_path.glob(f"{verb}-{name}.data/reference-*"))
            assert len(references) == (verb == "dpo")
        found, right = (curve(tmp_path / f"{verb}-{name}") for name in ("two", "one"))
        assert [v for row in found for v in row] == pytest.approx([v for row in right for v in row], rel=1e-9)
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"prompt": "a", "chosen": "b"}\n')
        words = ("--data.path", bad, "--out", tmp_path / "bad", "--nproc", "2")
        code, err = luban(verb, f"luban_{verb}_cpu", "--init", base, *words)
        assert code == 1 and err.count("a row needs") == 1 and "process" not in err, err
        assert not list(tmp_path.glob("bad.data"))
    one, two = (open_artifact(tmp_path / f"reward-{name}", "run").figures for name in ("one", "two"))
    assert two["measured_at"] == 4 and two["accuracy"] == pytest.approx(one["accuracy"])


def test_several_tasks_in_two_processes_equal_one(luban, shards, recipe, tmp_path):
    """Whatever tasks the rows of a process are of; one task is so rare that most processes have none of it."""
    tasks = tmp_path / "tasks.toml"
    tasks.write_text(
        f"""base = "{recipe}"
[model.position]
type = "learned"
[model.head]
type = "multitask"
heads = [
  {{ name = "text", head = "language_model" }},
  {{ name = "rest", head = {{ type = "language_model", bias = true }} }},
]
[objective]
type = "multitask"
[[objective.tasks]]
name = "text"
weight = 7
[[objective.tasks]]
name = "rest"
weight = 1
objective = {{ type = "prefix" }}
"""
    )
    command = ("pretrain", tasks, "--data.path", shards, *DOUBLE, "--validation.every", "8")
    for name, words in (("one", ("--train.accumulate", "2")), ("two", ("--nproc", "2"))):
        code, err = luban(*command, "--out", tmp_path / name, *words)
        assert code == 0, err
    found, right = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [v for row in found for v in row] == pytest.approx([v for row in right for v in row], rel=1e-9)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")]
    cosines = [[row[key] for row in run if (key := "gradient_cosine/text/rest") in row] for run in rows]
    assert len(cosines[0]) == 3 and cosines[0] == pytest.approx(cosines[1], rel=1e-7)


PIPELINE = ("--nproc", "2", "--plan.pipeline", "2", "--plan.microbatches", "2")
BF16 = ("--train.precision", "bf16", "--train.weights", "bf16")


def test_what_cannot_be_divided_is_refused_before_anything_starts(shards, recipe, tmp_path):
    command = (str(recipe), "--data.path", str(shards), "--out", str(tmp_path / "run"))
    for words, message in (
        (("--nproc", "2", "--plan.shard", "3"), "needs 3 processes, and there are 2"),
        (("--nproc", "3"), "batch_size 4 can't be divided among 3 processes: it must be a multiple of 3, such as 3"),
        (("--nproc", "0"), "--nproc takes a number of processes from 1"),
        (("--plan.shard", "2"), r"needs 2 processes, and there are 1: start 2 \(--nproc 2\)"),
        (("--nproc", "4", "--plan.tensor", "4"), "4 divides the heads of attention, and there are 2: use at most .* 2"),
        (("--nproc", "3", "--plan.pipeline", "3"), "needs 3 layers, and there are 2: use at most --plan.pipeline 2"),
        (
            (*PIPELINE, "--plan.schedule", "pipedream"),
            "has no moment at which all gradients are known: use --train.clip 0",
        ),
        (
            (*PIPELINE, "--plan.schedule", "pipedream", "--train.clip", "0", "--model.tied_head", "true"),
            r"several have decoder.embedding.tokens.weight: use .* \(model.tied_head = false",
        ),
        ((*PIPELINE, "--plan.schedule", "zero_bubble", "--plan.remat", "full"), "does not go with plan.remat"),
        (("--nproc", "2", "--plan.shard", "2", "--optim.type", "adamw", *BF16), "train.weights bf16 does not go with"),
        (
            ("--nproc", "2", "--plan.replicate", "2", "--plan.zero", "2"),
            "plan.zero 2 .* plan.shard is 1: use --plan.shard N --plan.zero 2",
        ),
        (("--nproc", "2", "--plan.tensor", "2", "--plan.zero", "2"), "none is left for it of 2 in all: start 4"),
        (("--nproc", "3", "--plan.context", "3"), "multiple of 6, such as --train.seq_len 30"),
    ):
        for only in [()] + [("--dry-run",)] * (
            "--nproc" in words
        ):  # which plans for any number of processes without it
            with pytest.raises(UsageError, match=message):
                pretrain.run([*command, *words, *only])
    assert not list(tmp_path.iterdir())


def test_zero_alone_divides_the_training_state(shards, recipe, tmp_path, capsys):
    """It needs no number of shards beside that of processes; replicas are what comes of no wish."""
    for words, told in (
        (("--plan.zero", "3"), "shard 2 (ZeRO 3)"),
        (("--plan.zero", "1"), "shard 2 (ZeRO 1)"),
        ((), "replicate 2"),
    ):
        pretrain.run(
            [str(recipe), "--data.path", str(shards), "--out", str(tmp_path / "r"), "--nproc", "2", *words, "--dry-run"]
        )
        assert f"2 processes: {told}" in capsys.readouterr().out


def test_a_worker_of_an_elastic_run_is_not_told_that_it_is_alone(shards, recipe, tmp_path, monkeypatch):
    """Its command has no number of processes: the agent, which has it, asks whether plan.zero has shards."""
    words = [str(recipe), "--data.path", str(shards), "--out", str(tmp_path / "r"), "--plan.zero", "2"]
    words += ["--elastic.enabled", "true"]
    monkeypatch.setattr("luban.cli.pretrain.take_place", lambda verb, argv: None)
    monkeypatch.setattr("luban.cli.training.train_elastic", lambda call, words: 40 + call.recipe.plan.zero)
    with pytest.raises(UsageError, match="none is left for it of 1 in all"):
        pretrain.run(words)
    monkeypatch.setenv(VARIABLE, json.dumps({"name": "here/0", "folder": str(tmp_path)}))
    assert pretrain.run(words) == 42


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_and_is_named(luban, shards, recipe, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch.distributed\n"
        "    def fail(*_, **__):\n"
        "        os._exit(9)\n"
        "    torch.distributed.all_reduce = fail\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    code, err = luban("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--nproc", "2")
    assert code != 0 and not (tmp_path / "run").exists()
    assert "process 1 of 2 failed with exit code 9" in err and "Traceback" not in err, err


KILLS = {  # the function, and in which of its calls process 1 is killed
    "save": ("luban.checkpoint.saver", "write_safetensors", 8),  # in the third checkpoint, of three files each
    "load": ("luban.parallel.engine", "take_up", 1),
    "step": ("luban.parallel.engine", "clip_factor", 11),
}


def killed_in(moment: str, folder: Path) -> dict[str, str]:
    """The environment of a run in which process 1 is killed at a moment."""
    module, name, call = KILLS[moment]
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        f"    import {module} as module\n"
        f"    whole, calls = module.{name}, []\n"
        "    def counted(*words, **named):\n"
        "        calls.append(1)\n"
        f"        if len(calls) == {call}:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return whole(*words, **named)\n"
        f"    module.{name} = counted\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.parametrize("moment", ["save", *(pytest.param(m, marks=pytest.mark.slow) for m in ("load", "step"))])
def test_a_process_killed_at_any_moment_is_named_and_nothing_finished_is_lost(start, shards, recipe, tmp_path, moment):
    words = ("--train.steps", "12", "--validation.every", "0", "--checkpoint.every", "4", "--plan.shard", "2")
    command = ("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--nproc", "2", *words)
    if moment == "load":
        stopped = start(*command, environment=killed_in("step", tmp_path / "first"))
        stopped.communicate()
    process = start(*command, environment=killed_in(moment, tmp_path / "hook"))
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "Traceback" not in err, err
    assert "process 1 of 2 failed with exit code 137, which ended the others" in err, err
    checkpoints = CheckpointManager(tmp_path / "run.incomplete")
    finished = checkpoints.steps()[-1]
    assert finished == 8 or (finished == 4 and moment != "save")  # the third save begins when the second is whole
    found = checkpoints.resume()
    assert found is not None and found[0] == finished
    again = start(*command)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0 and f"resuming after step {finished}" in err, err


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_process_that_hangs_is_named_and_the_last_checkpoint_goes_on(luban, start, shards, recipe, tmp_path, hung):
    command = (
        "pretrain",
        recipe,
        "--data.path",
        shards,
        "--out",
        tmp_path / "run",
        "--nproc",
        "2",
        "--plan.tensor",
        "2",
    )
    process = start(*command, "--train.steps", "2000", "--checkpoint.every", "8", "--validation.every", "0")
    checkpoints = CheckpointManager(tmp_path / "run.incomplete")
    while process.poll() is None and not checkpoints.steps():
        time.sleep(0.05)
    both = children(process.pid)
    other = both[1 - hung]
    began = time.monotonic()
    os.kill(both[hung], signal.SIGSTOP)
    while Path(f"/proc/{other}").exists() and Path(f"/proc/{other}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and f"process {hung} of 2 has sent no heartbeat" in err, err
    assert f"of 2 processes {hung} did not end by itself" in err, err
    done = checkpoints.steps()[-1]
    code, err = luban(*command, "--train.steps", done + 2, "--validation.every", "0")
    assert code == 0 and f"resuming after step {done}" in err, err


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["pipeline", "shard"])
def test_a_process_in_an_endless_loop_is_named_with_where_it_stands(start, shards, recipe, tmp_path, plan):
    """Behind a step that all finished, before the collectives of the next one."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from luban.train.loop import Loop\n"
        "    whole = Loop._submit\n"
        "    def endless(self, stop):\n"
        "        while self.state.progress.step == 12:\n"
        "            pass\n"
        "        return whole(self, stop)\n"
        "    Loop._submit = endless\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(hook), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = ("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--nproc", "2")
    words = ("--train.hang_seconds", "3", f"--plan.{plan}", "2", "--validation.every", "0")
    began = time.monotonic()
    process = start(*command, *words, environment=environment)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and time.monotonic() - began < 200, err
    assert "process 1 of 2 is stuck, and the others wait" in err and "process 1, compute behind step 12" in err, err
    assert "process 1 of 2 is stuck here" in err and err.count("in endless") >= 2, err
    again = start(*command, *words)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "resuming after step 12" in err, err


def test_a_process_with_another_recipe_is_refused(luban, start, shards, recipe, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank, seed in enumerate((1, 2)):
        environment = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ("pretrain", recipe, "--data.path", shards, "--out", tmp_path / "run", "--train.seed", seed)
        processes.append(start(*words, environment=environment))
    first, second = (process.communicate(timeout=120)[1] for process in processes)
    assert all(process.returncode != 0 for process in processes)
    assert "process 1 of this run has another recipe than process 0" in first, (first, second)
    assert not list(tmp_path.iterdir())

"""What is checked before training, and what a run leaves behind."""

from __future__ import annotations

import gzip
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clock import Clock

from luban.checkpoint.weights import weights_hash
from luban.cli.main import main
from luban.core.artifact import open_artifact
from luban.core.errors import ArtifactError, ConfigError, MissingExtra, UnsupportedError, UsageError
from luban.core.units import bytes_
from luban.load.model import load_model
from luban.parallel.engine import TrainEngine
from luban.planner.accelerators import accelerator
from luban.planner.prediction import UNCOMPILED_OVERHEAD
from luban.planner.remat.schedules import Solved
from luban.train import predict
from luban.train.budget import RESERVE, TIMED, WARM
from luban.train.pretrain import pretrain
from luban.train.run import dry_run, prepare, train


def test_a_run_can_be_loaded_and_continued_from(tiny, tmp_path):
    run = pretrain(tiny(), tmp_path / "base")
    figures = open_artifact(run, "run").figures
    loaded = load_model(run)
    assert weights_hash(dict(loaded.module.named_parameters())) == figures["weights_hash"]
    more = pretrain(tiny(init=str(run), model={}, train={"steps": 1}, schedule={"warmup": 10**6}), tmp_path / "more")
    manifest = open_artifact(more, "run")
    assert manifest.parent("init").content_hash == open_artifact(run).content_hash
    # one step at a millionth of the learning rate: still the base's weights
    for ours, theirs in zip(load_model(more).module.parameters(), loaded.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    with pytest.raises(ConfigError, match=r"model.layers is 3, but .*base has 2"):
        pretrain(tiny(init=str(run), model={"layers": 3}), tmp_path / "other")


def test_a_shipped_recipe_tunes_a_model_of_another_size_by_the_command_line(tiny, shards, tmp_path, capsys):
    base = pretrain(tiny(), tmp_path / "base")
    command = ["pretrain", "tiny_pretrain_cpu", "--init", str(base), "--data.path", str(shards), "--train.steps", "1"]
    command += ["--train.seq_len", "32", "--train.batch_size", "2", "--out", str(tmp_path / "more")]
    assert main(command) == 0
    assert "the recipe's [model] is ignored" in capsys.readouterr().err
    assert load_model(tmp_path / "more").spec == load_model(base).spec
    command[-1] = str(tmp_path / "other")
    assert main([*command, "--model.width", "64"]) == 2
    assert f"model.width is 64, but {base} has 32" in capsys.readouterr().err
    assert main([*command, "--model.width", "32"]) == 0  # the same is no contradiction


@pytest.mark.parametrize("there", [True, False])
def test_out_may_be_a_symbolic_link_to_a_directory(tiny, tmp_path, there):
    disk, link = tmp_path / "disk" / "run", tmp_path / "run"
    disk.mkdir(parents=True) if there else disk.parent.mkdir()
    link.symlink_to(disk, target_is_directory=True)
    run = pretrain(tiny(train={"steps": 2}), link)
    assert link.is_symlink() and open_artifact(run, "run").figures["step"] == 2
    assert load_model(link).path.parent.parent == link
    assert pretrain(tiny(train={"steps": 3}), link) == link and open_artifact(link, "run").figures["step"] == 3
    assert link.is_symlink() and not list(tmp_path.rglob("*.incomplete"))


def test_a_directory_that_cannot_be_replaced_is_refused_before_training(tiny, shards, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="is the working directory, which can't be replaced"):
        pretrain(tiny(), Path())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "empty")
    with pytest.raises(ArtifactError, match="is a mount point, which can't be replaced"):
        pretrain(tiny(), tmp_path / "empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_the_best_checkpoint_is_kept_beside_the_last(tiny, tmp_path):
    recipe = tiny(checkpoint={"every": 2, "keep": 1}, train={"steps": 12}, optim={"lr": 0.3})
    run = pretrain(recipe, tmp_path / "run")  # a learning rate that soon makes it worse
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    best = min(scores, key=scores.get)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == sorted({f"step_{best:06d}", "step_000012"})
    figures = open_artifact(run).figures
    assert figures["checkpoints"] == {"best": f"step_{best:06d}", "last": "step_000012"}
    loaded = load_model(run)
    assert loaded.path.name == f"step_{best:06d}"
    assert weights_hash(dict(loaded.module.named_parameters())) == figures["weights_hash"]


def test_a_budget_fixes_the_steps_in_the_manifest_and_the_schedule_ends_there(tiny, tmp_path, monkeypatch):
    """By a clock on which a step takes an eighth of a second and everything else takes no time."""
    clock = Clock()
    submit = TrainEngine.submit
    monkeypatch.setattr(TrainEngine, "submit", lambda *args, **kwargs: clock.advance(0.125) or submit(*args, **kwargs))
    recipe = tiny(
        train={"steps": 10**6, "budget_seconds": 8.0},
        checkpoint={"every": 10**6},
        validation={"every": 0},
        schedule={"warmup": 2, "final": 0.0},
    )
    run = train(recipe, tmp_path / "run", task="pretrain", name="tiny", clock=clock)
    figures = open_artifact(run).figures
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    left = 8 * (1 - RESERVE) - (WARM + TIMED) * 0.125  # seconds after the timed steps
    assert last["step"] == figures["steps_fixed"]["fixed"] == WARM + TIMED + int(left / 0.125) == 60
    assert last["lr"] == pytest.approx(0.0, abs=1e-9)
    assert figures["seconds"] == 60 * 0.125 and figures["tokens_per_second"] == pytest.approx(figures["tokens"] / 7.5)


def test_too_little_memory_is_refused_with_the_settings_that_would_fit(tiny, tmp_path, monkeypatch, capsys):
    recipe = tiny(train={"batch_size": 64, "seq_len": 64, "precision": "bf16"})
    prediction = prepare(recipe)[-1]
    space = (1 + UNCOMPILED_OVERHEAD) * (
        prediction.memory.total - 1
    )  # the kernels' library keeps some of what it passes through
    monkeypatch.setattr(predict, "free_memory", lambda device: space)
    with pytest.raises(UnsupportedError) as refused:
        pretrain(recipe, tmp_path / "run")
    message = str(refused.value)
    assert f"training would need {prediction.memory}" in message
    for flag in ("--train.accumulate", "--train.batch_size", "--plan.remat selective", "--plan.remat full"):
        assert flag in message
    # what is advised fits, and one row more doesn't
    batch = int(re.search(r"--train.batch_size (\d+)", message).group(1))
    assert 1 < batch < 64

    def need(remat="none", **train):
        changed = replace(recipe, train=replace(recipe.train, **train), plan=replace(recipe.plan, remat=remat))
        return prepare(changed)[-1].memory.total

    assert need(batch_size=batch) < prediction.memory.total <= need(batch_size=batch + 1)
    assert bytes_(need(accumulate=2)) in message and bytes_(need(remat="selective")) in message
    # no policy alone is enough: the largest batch with each
    space = (1 + UNCOMPILED_OVERHEAD) * need(remat="full", batch_size=40)
    monkeypatch.setattr(predict, "free_memory", lambda device: space)
    with pytest.raises(UnsupportedError) as refused:
        dry_run(recipe)
    with_full = int(re.search(r"--plan.remat full --train.batch_size (\d+)", str(refused.value)).group(1))
    alone = int(re.search(r"; --train.batch_size (\d+) is", str(refused.value)).group(1))
    assert alone < 40 <= with_full < 64 and "memory" in capsys.readouterr().out
    monkeypatch.setattr(predict, "free_memory", lambda device: 1000)
    with pytest.raises(UnsupportedError, match="choose a smaller model"):
        pretrain(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_what_cannot_work_is_refused_before_anything_is_written(tiny, shards, tmp_path, monkeypatch):
    wrong = [
        (tiny(train={"seq_len": 128}), ConfigError, "context is 64"),
        (tiny(data={"path": ""}), UsageError, "--data.path"),
        (tiny(data={"path": str(shards.parent / "corpus")}), ArtifactError, "holds a corpus; needed here: shards"),
        (tiny(data={"path": "nowhere"}), ArtifactError, "nowhere"),
        (tiny(model={"vocab_size": 17}), ConfigError, "vocab_size"),
    ]
    if not torch.cuda.is_available():
        wrong.append((tiny(train={"device": "cuda"}), UnsupportedError, "--train.device cpu"))
    for recipe, error, message in wrong:
        with pytest.raises(error, match=message):
            pretrain(recipe, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match="tensorboard"):
        pretrain(tiny(train={"tensorboard": True}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_command_line_answers_in_one_line(shards, tmp_path, capsys):
    command = ["pretrain", "tiny_pretrain_cpu", "--data.path", str(shards), "--out", str(tmp_path / "run")]
    for extra, message in ((["--train.step", "3"], "did you mean 'steps'"), (["--optim.type", "adam"], "adamw")):
        assert main([*command, *extra]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert main([*command, "--dry-run"]) == 0
    assert "FLOPs" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_without_a_compiler_training_runs_uncompiled_and_says_so(tiny, tmp_path, monkeypatch, capsys):
    from luban.parallel import device

    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    recipe = tiny()
    pretrain(replace(recipe, train=replace(recipe.train, compile=True)), tmp_path / "run")
    assert "C++ compiler" in capsys.readouterr().err


def test_a_profile_is_a_trace_that_browsers_open(tiny, tmp_path, capsys):
    run = pretrain(tiny(train={"profile": 2}, validation={"every": 0}), tmp_path / "run")
    assert {path.name for path in (run / "profile").iterdir()} == {
        "steps_000004_000005.json.gz",
        "steps_000004_000005.txt",
    }
    trace = json.loads(gzip.decompress((run / "profile/steps_000004_000005.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::embedding") == 2  # one a step, and of no other step
    assert "aten::mm" in (run / "profile/steps_000004_000005.txt").read_text()
    assert "ui.perfetto.dev" in capsys.readouterr().err
    open_artifact(run, "run")  # whole, although nothing vouches for a profile's bytes
    short = pretrain(tiny(train={"profile": 2, "steps": 2}), tmp_path / "short")
    assert not (short / "profile").exists() and "nothing was profiled" in capsys.readouterr().err


def test_a_run_keeps_what_was_predicted_beside_what_was_measured(tiny, tmp_path, capsys):
    run = pretrain(tiny(), tmp_path / "run")
    figures = open_artifact(run, "run").figures
    prediction = prepare(tiny())[-1]
    assert figures["predicted_memory_bytes"] == prediction.memory.total
    assert figures["predicted_step_seconds"] > 0 and 0 < figures["step_seconds"] < figures["seconds"]
    assert figures["model_flops_per_step"] == prediction.model_flops
    assert figures["kernels"] and "scaled_dot_product_attention" in figures["kernels"][0]
    assert "attention: torch's" in capsys.readouterr().err


def test_a_run_keeps_what_its_schedule_of_rematerialisation_keeps(tiny, tmp_path, capsys):
    run = pretrain(tiny(model={"layers": 5}, plan={"remat": "sqrt"}), tmp_path / "run")
    (figures,) = open_artifact(run, "run").figures["schedules"]
    assert f"plan.remat sqrt: {Solved(**figures)}" in capsys.readouterr().err
    assert figures["layers"] == 5 and 0 < figures["peak_bytes"] < figures["everything_bytes"]


def test_an_attention_that_cannot_serve_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UnsupportedError, match=r"cuDNN can't compute this attention.*CUDA"):
        pretrain(tiny(train={"attention": "cudnn", "device": "cpu"}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_cost_and_utilisation_where_the_accelerator_is_known(tiny):
    prediction = prepare(tiny(train={"steps": 1000}))[-1]
    assert not any(line.startswith("cost") for line in prediction.lines())  # a CPU's power isn't known
    machine = replace(prediction.machine, accelerator=accelerator("h100-sxm"))
    known = replace(
        prediction,
        machine=machine,
        step=replace(
            prediction.step,
            matmul_seconds=3.6,
            attention_seconds=0.0,
            elementwise_seconds=0.0,
            measured_seconds=0.0,
            update_seconds=0.0,
        ),
        model_flops=3.6 * 989.4e12 / 2,
        precision="bf16",
    )
    text = "\n".join(known.lines())
    assert "MFU 50.0%" in text and "1 accelerator-hours, at most 0.7 kWh (700 W)" in text
    assert known.figures()["peak_flops"] == 989.4e12 and "about 1h00m" in text
    assert "about 1m40s" in "\n".join(replace(known, budget=100.0).lines())


@pytest.mark.parametrize(
    "layer, plan, said",
    [
        (
            {"mixer": {"type": "lsh"}},
            {"context": 2},
            "the mixer lsh does not go with plan.context: use --plan.replicate",
        ),
        ({"mixer": {"type": "routing"}}, {"replicate": 2}, "mixer routing .* train it in one process"),
        ({"arrangement": {"type": "reversible"}}, {"tensor": 2}, "arrangement reversible does not go with plan.tensor"),
        ({"arrangement": {"type": "reversible"}}, {"shard": 2}, "arrangement reversible does not go with plan.shard"),
        ({"arrangement": {"type": "reversible"}}, {"remat": "full"}, "keep nothing that plan.remat could recompute"),
        (
            {"arrangement": {"type": "reversible"}},
            {"offload": "cpu", "offload_weights": "cpu"},
            "plan.offload_weights cpu does not go with reversible layers",
        ),
    ],
)
def test_a_dry_run_refuses_plans_that_do_not_go_with_mixers_and_arrangements(tiny, layer, plan, said):
    with pytest.raises(ConfigError, match=said):
        dry_run(tiny(model={"layer": layer}, plan=plan, optim={"type": "adamw"}))


def test_weights_without_fp32_ones_behind_them_are_not_offloaded(tiny):
    """Offloading keeps fp32 weights, so that the setting would change nothing."""
    with pytest.raises(ConfigError, match=r"train.weights bf16 does not go with plan.offload cpu"):
        dry_run(tiny(train={"precision": "bf16", "weights": "bf16"}, plan={"offload": "cpu"}, optim={"type": "adamw"}))


def test_held_out_text_is_measured_without_what_training_adds(tiny, tmp_path):
    figures = []
    for name, objective in (("bare", {}), ("shaped", {"smoothing": 0.5, "z_loss": 0.1})):
        recipe = tiny(objective=objective, optim={"lr": 1e-9}, train={"steps": 2})
        pretrain(recipe, tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        figures.append((rows[0]["loss"], next(row["heldout_loss"] for row in rows if "heldout_loss" in row)))
    (bare, heldout), (shaped, again) = figures
    assert shaped > bare + 0.5 and again == pytest.approx(heldout, abs=1e-4)

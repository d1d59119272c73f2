"""Runs of adapters: what a checkpoint holds, resuming, the base unchanged, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from training_data import make_shards

from luban import Engine
from luban.adapters.ia3 import IA3
from luban.adapters.lora import LoRA
from luban.adapters.prompt import PromptTuning
from luban.cli.export import say_offset
from luban.cli.main import main
from luban.core.artifact import read_manifest
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, ConfigError, UnsupportedError
from luban.load.adapter_export import export_adapter, merged
from luban.load.model import load_model
from luban.models.build import state_of
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe

TINY = {
    "schedule": {"warmup": 1},
    "checkpoint": {"every": 2},
    "validation": {"every": 0, "batches": 1},
    "optim": {"type": "adamw", "lr": 3e-3},
    "train": {"steps": 2, "batch_size": 2, "seq_len": 16, "device": "cpu", "log_every": 1},
}
MODEL = {
    "width": 16,
    "layers": 1,
    "context": 32,
    "tied_head": True,
    "layer": {"mixer": {"heads": 2, "kv_heads": 1}, "feedforward": {"width": 24}},
}
LORA = {"type": "lora", "rank": 2, "alpha": 4, "rate_ratio": 4.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    data = {"path": str(make_shards(folder))}
    return pretrain(from_dict(Recipe, {**TINY, "model": MODEL, "data": data}), folder / "run")


@pytest.fixture
def recipe(base) -> Recipe:
    data = {"path": str(base.parent / "shards")}
    return from_dict(Recipe, {**TINY, "init": str(base), "data": data, "adapter": LORA})


def tensors(run: Path, step: int, which: str = "model") -> dict[str, torch.Tensor]:
    with safe_open(run / "checkpoints" / f"step_{step:06d}" / f"{which}.safetensors", "pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def test_a_run_holds_what_is_trained_and_goes_on_where_it_stopped(recipe, base, tmp_path):
    """Resumed = uninterrupted, with dropout and LoRA+'s rates; checkpoints and optimizer state are of the adapter alone; the
    base's files and weights don't change."""
    before = {file: file.read_bytes() for file in base.rglob("*.safetensors")}
    longer = replace(recipe, train=replace(recipe.train, steps=4))
    straight = pretrain(longer, tmp_path / "straight")
    pretrain(recipe, tmp_path / "parts")
    parts = pretrain(longer, tmp_path / "parts")
    assert {file: file.read_bytes() for file in base.rglob("*.safetensors")} == before
    first, second = tensors(straight, 4), tensors(parts, 4)
    assert first.keys() == second.keys() and all(".adapters." in name for name in first)
    changed = {n for n, p in tensors(straight, 2).items() if not torch.equal(p, first[n])}
    assert changed == set(first)
    assert {name.rpartition("/")[0] for name in tensors(straight, 4, "optimizer")} == set(first)
    manifest = read_manifest(straight)
    assert manifest.parent("init").content_hash == read_manifest(base).content_hash
    assert manifest.figures["parameters"] == sum(p.numel() for p in first.values())
    m, plain = load_model(straight), load_model(base)
    over = load_model(base, adapter=straight)
    x = torch.randint(0, plain.spec.vocab_size, (1, 9))
    assert not torch.equal(m.module(x), plain.module(x)) and torch.equal(m.module(x), over.module(x))
    kept = state_of(m.module)
    assert all(torch.equal(kept[name], tensor) for name, tensor in state_of(plain.module).items())


def test_an_unfinished_run_of_adapters_is_used_with_a_word(recipe, base, tmp_path, capsys):
    """Over its base, by its own name and by a name in an engine alike; without a checkpoint there is nothing to use."""
    run = pretrain(recipe, tmp_path / "run")
    wanted = load_model(base, adapter=run).adapter.weights
    unfinished = run.rename(tmp_path / "run.incomplete")
    manifest = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "status": "unfinished", "content_hash": ""}))
    capsys.readouterr()
    assert load_model(base, adapter=run).adapter.weights == wanted
    said = f"{unfinished} is an unfinished run: its last checkpoint so far, step_{recipe.train.steps:06d}, is used"
    assert said in capsys.readouterr().err
    pool = Engine(load_model(base), adapters={"a": run}).adapters
    assert pool is not None and pool.held == ["a"]
    shutil.rmtree(unfinished / "checkpoints")
    for use in (lambda: load_model(base, adapter=run), lambda: Engine(load_model(base), adapters={"a": run})):
        with pytest.raises(ArtifactError, match=r"run is unfinished .* and has no checkpoint yet"):
            use()


def test_precision_of_the_frozen_base(recipe):
    """The base is in bf16 alone; what is trained has fp32 weights behind it."""
    from luban.train.run import make_engine, open_run

    half = replace(recipe, train=replace(recipe.train, precision="bf16"))
    _, _, start, device = open_run(half)
    engine = make_engine(half, start, device)
    named = dict(engine.model.named_parameters())
    assert {p.dtype for p in named.values()} == {torch.bfloat16}
    assert {p.dtype for p in engine.params.parameters.values()} == {torch.float32}
    assert set(engine.params.parameters) == {name for name in named if ".adapters." in name}


def test_export_through_the_command_line(recipe, base, tmp_path, capsys):
    run = pretrain(recipe, tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "adapter")]) == 0
    assert main(["export", str(run), "--merge", "--out", str(tmp_path / "merged")]) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2 and config["base_model_name_or_path"] == str(base)
    x = torch.randint(0, 200, (1, 9))
    wanted = load_model(run).module(x)
    torch.testing.assert_close(load_model(tmp_path / "merged").module(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_model(base, adapter=tmp_path / "adapter").module(x), wanted)
    assert main(["export", str(base), "--merge", "--out", str(tmp_path / "no")]) == 1
    assert "has no adapter, so there is nothing to merge" in capsys.readouterr().err
    with pytest.raises(UnsupportedError, match="a merge into quantised weights"):
        merged(load_model(run, dtype="int8"))


def test_what_can_not_be_is_refused(recipe, base, tmp_path):
    with pytest.raises(ConfigError, match="give --init MODEL"):
        from_dict(Recipe, {**TINY, "adapter": LORA})
    with pytest.raises(ConfigError, match=r"unknown adapter 'lorra'.*did you mean 'lora'"):
        from_dict(Recipe, {**TINY, "init": str(base), "adapter": {"type": "lorra"}})
    run = pretrain(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match="is an adapter over another model"):
        pretrain(replace(recipe, init=str(run)), tmp_path / "over")
    with pytest.raises(ArtifactError, match="is an adapter itself"):
        load_model(run, adapter=run)
    assert not (tmp_path / "over").exists()


def test_a_run_over_a_base_in_four_bits(recipe, base, tmp_path):
    """Loaded, it computes what was trained; a merge into its weights is refused, the adapter alone is exported."""
    from luban.load.adapter_export import export_adapter

    packed = from_dict(
        Recipe, {**TINY, "init": str(base), "data": {"path": recipe.data.path}, "adapter": {"base": "nf4", **LORA}}
    )
    run = pretrain(packed, tmp_path / "run")
    assert set(tensors(run, 2)) and all(".adapters." in name for name in tensors(run, 2))
    m = load_model(run)
    assert m.module.decoder.blocks["0"].mixer.output.packed is not None
    with pytest.raises(UnsupportedError, match="a merge into quantised weights"):
        merged(m)
    export_adapter(m, tmp_path / "out")


@pytest.mark.parametrize(
    "adapter",
    [{**LORA, "targets": ("q", "*.blocks.2.mixer.*")}, {"type": "llama_adapter", "layers": 3}],
    ids=["pattern", "llama_adapter"],
)
def test_adapters_of_upper_layers(adapter, recipe, base, tmp_path):
    """A step's time is predicted from models of one and two layers, which lack what the adapter names."""
    data = {"path": str(base.parent / "shards")}
    deep = pretrain(from_dict(Recipe, {**TINY, "model": {**MODEL, "layers": 3}, "data": data}), tmp_path / "deep")
    run = pretrain(from_dict(Recipe, {**TINY, "init": str(deep), "data": data, "adapter": adapter}), tmp_path / "run")
    assert read_manifest(run).status == "finished"
    assert any(".blocks.2." in name for name in tensors(run, 2))


@pytest.mark.parametrize("kept", ["int8", "nf4"])
def test_peft_directories_remember_a_packed_base(kept, recipe, base, tmp_path, capsys):
    """What is read again computes what the run does; served by name, too, as is said."""
    run = pretrain(replace(recipe, adapter=LoRA(rank=2, base=kept)), tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "adapter")]) == 0
    assert f"it was trained over weights in {kept}" in capsys.readouterr().err
    x = torch.randint(0, 200, (1, 9))
    with torch.no_grad():
        wanted = load_model(run).module(x)
        again = load_model(base, adapter=tmp_path / "adapter")
        assert (wanted - load_model(base).module(x)).abs().max() > 1e-4
        torch.testing.assert_close(again.module(x), wanted, rtol=0, atol=0)
    with pytest.raises(UnsupportedError, match="a merge into quantised weights"):
        merged(again)
    Engine(load_model(base), adapters={"a": tmp_path / "adapter"})
    assert f"all adapters were trained over weights in {kept}, so run is kept in {kept} once" in capsys.readouterr().err


def test_adapters_are_exported_in_a_given_precision(recipe, tmp_path):
    run = pretrain(recipe, tmp_path / "run")
    for dtype in ("float32", "bfloat16"):
        assert main(["export", str(run), "--dtype", dtype, "--out", str(tmp_path / dtype)]) == 0
        with safe_open(tmp_path / dtype / "adapter_model.safetensors", "pt") as held:
            assert {str(held.get_tensor(name).dtype) for name in held.keys()} == {f"torch.{dtype}"}  # noqa: SIM118


def test_how_scores_of_an_exported_reward_model_differ_is_said(capsys):
    for offset, said in ((-0.25, "those of luban score on rm plus -0.25"), (0.0, "")):
        say_offset(SimpleNamespace(name="rm", manifest=SimpleNamespace(figures={"score_offset": offset})))  # type: ignore[arg-type]
        assert said in (text := capsys.readouterr().err) and bool(text) == bool(said)


def test_modules_beside_a_prompt_are_not_lost_in_an_export(recipe, tmp_path):
    run = pretrain(replace(recipe, adapter=PromptTuning(length=2, modules_to_save=("norm",))), tmp_path / "run")
    with pytest.raises(UnsupportedError, match="PEFT saves no modules but a head beside prompts, and norm was trained"):
        export_adapter(load_model(run), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_is_said_of_a_run(recipe, tmp_path, capsys):
    """How many parameters are trained; of another kind of adapter, its type before its other fields."""
    run = pretrain(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert f"parameters, {read_manifest(run).figures['parameters']} trained, on" in said
    with pytest.raises(ArtifactError, match=r"config\.adapter\.type was 'lora', now 'ia3'"):
        pretrain(replace(recipe, adapter=IA3()), tmp_path / "run")

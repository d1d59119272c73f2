"""Adapters that come and go while an engine runs: each request gets what its adapter gives alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from adapted_models import GREEDY, SPEC, alone, prompts, write_adapted, write_adapter
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint

from luban import Engine, Sampling, load_model
from luban.adapters.bank import reserve_stacks
from luban.adapters.lora import LoRA
from luban.core import log
from luban.core.errors import ArtifactError, DataError, LineageError, UnsupportedError, UsageError
from luban.load.adapted import BASE
from luban.models.build import state_of
from luban.serve import adapters


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model and three adapters for it."""
    return write_adapted(tmp_path_factory.mktemp("served"))


def begun(engine, text, name, tokens=GREEDY.max_tokens):
    """A request with the adapter, of which the engine has made a first token."""
    request = engine.request(text, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))
    engine.use_adapter(request, name)
    engine.submit(request)
    while not request.result.token_ids:
        engine.step()
    return request


def finished(engine, request):
    while engine.step():
        pass
    assert request.error is None
    return request.result.token_ids


@pytest.mark.parametrize("invariant", [False, True])
def test_they_come_and_go_between_steps(served, invariant):
    """An engine that began without any. What runs keeps its adapter, or none, whatever comes and goes, also where the name gets
    another adapter; what is removed leaves the memory with its last request."""
    base, made = served
    engine, texts = Engine(load_model(base), more_adapters=True, batch_invariant=invariant), prompts(4)
    pool = engine.adapters
    assert pool is not None and pool.names == ()
    plain = begun(engine, texts[0], "")
    pool.add("x", made["a"])
    first = begun(engine, texts[1], "x")
    pool.add("y", made["b"])
    second = begun(engine, texts[2], "y")
    pool.remove("x")
    assert pool.names == ("y",)
    with pytest.raises(DataError, match="there is no adapter 'x'"):
        engine.generate(texts[0], GREEDY, adapters="x")
    pool.add("x", made["b"])
    again = begun(engine, texts[1], "x")
    assert len(pool.held) == 3
    finished(engine, plain)
    for request, adapter, text in ((plain, None, 0), (first, "a", 1), (second, "b", 2), (again, "b", 1)):
        assert finished(engine, request) == alone(base, made.get(adapter), texts[text]), adapter
    assert sorted(pool.held) == ["x (2)", "y"]
    for name in ("x", "y"):
        pool.remove(name)
    engine.step()
    assert not pool.held and not [name for name, _ in engine.model.module.named_modules() if "adapters" in name]
    assert engine.generate(texts[3], GREEDY)[0].token_ids == alone(base, None, texts[3])


@pytest.mark.parametrize("ahead", [False, True])
def test_random_comings_and_goings(served, ahead):
    """With fewer places in memory than adapters, some of which wait for one; also where a forward is submitted before the tokens of
    the last one are known."""
    base, made = served
    rng, texts = random.Random(), prompts(5)
    wanted = {(name, at): alone(base, made.get(name), text) for name in ("", *made) for at, text in enumerate(texts)}
    engine = Engine(load_model(base), adapters={"n0": made["a"]}, more_adapters=True, max_adapters=2, max_batch=3)
    engine.batch.runs_ahead = ahead
    pool, kinds, requests = engine.adapters, {"": "", "n0": "a"}, []
    assert pool is not None
    for _ in range(60):
        what = rng.random()
        if what < 0.2 and (name := f"n{rng.randrange(4)}") not in kinds:
            kinds[name] = rng.choice(list(made))
            pool.add(name, made[kinds[name]])
        elif what < 0.35 and len(kinds) > 1:
            pool.remove(name := rng.choice([each for each in kinds if each]))
            del kinds[name]
        elif what < 0.7:
            name, at = rng.choice(list(kinds)), rng.randrange(len(texts))
            request = engine.request(texts[at], GREEDY)
            engine.use_adapter(request, name)
            engine.submit(request)
            requests.append((request, kinds[name], at))
        else:
            engine.step()
            assert len(pool.held) <= 2
    while engine.step():
        pass
    for request, kind, at in requests:
        assert request.error is None and request.result.token_ids == wanted[kind, at], (kind, at)
    assert set(pool.held) <= {pool.require(name) for name in kinds if name}


def test_what_can_not_be_served_is_refused_and_changes_nothing(served, tmp_path, monkeypatch):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters={"a": made["a"]}, more_adapters=True), prompts(1)
    pool = engine.adapters
    assert pool is not None
    other = write_checkpoint(tmp_path / "other", SPEC, seed=5)
    foreign = write_adapter(other, LoRA(rank=2), tmp_path / "foreign")
    whole = write_adapter(base, LoRA(rank=2, targets=("q", "lm_head")), tmp_path / "head")
    for name, path, kind, said in (
        ("f", foreign, LineageError, "trained over a model with weights_hash"),
        ("w", whole, UnsupportedError, "changes more than the layers' projections"),
        ("n", tmp_path / "nothere", ArtifactError, "does not exist"),
        ("m", base, ArtifactError, "holds no adapter"),
        ("a", made["b"], DataError, "there is an adapter 'a' already"),
        (engine.model.name, made["b"], DataError, "a name of its own"),
        ("", made["b"], DataError, "a name of its own"),
    ):
        with pytest.raises(kind, match=said):
            pool.add(name, path)
    with pytest.raises(DataError, match="there is no adapter 'n'"):
        pool.remove("n")
    with pytest.raises(LineageError):  # what has the name stays, where what is to replace it can't
        pool.add("a", foreign, replace=True)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "add_to_banks", no_memory)
        with pytest.raises(UnsupportedError, match="there is no memory left for the adapter b"):
            pool.add("b", made["b"])
    assert pool.names == ("a",) and pool.held == ["a"]
    assert engine.generate(text, GREEDY, adapters="a")[0].token_ids == alone(base, made["a"], text)
    with pytest.raises(UsageError, match="made without more_adapters"):
        Engine(load_model(base), adapters=made).adapters.add("b", made["b"])
    with pytest.raises(UsageError, match="has an adapter already"):
        Engine(load_model(base, adapter=made["a"]), more_adapters=True)


def test_an_adapter_in_the_place_of_another(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters={"a": made["a"]}, more_adapters=True), prompts(1)
    old = begun(engine, text, "a")
    engine.adapters.add("a", made["c"], replace=True)
    assert engine.generate(text, GREEDY, adapters="a")[0].token_ids == alone(base, made["c"], text)
    assert finished(engine, old) == alone(base, made["a"], text) and engine.adapters.held == ["a (2)"]


def test_a_name_may_hold_a_dot_and_what_is_held_is_no_part_of_the_base(served, tmp_path):
    """Of a kind that is in no stack: a base whose hash is asked for afterwards is still the one without adapters."""
    base, made = served
    loose = shutil.copytree(made["c"], tmp_path / "loose")
    (loose / BASE).unlink()
    m, (text,) = load_model(base), prompts(1)
    before = state_of(m.module).keys()
    engine = Engine(m, adapters={"v1.5": loose, "a": made["a"]})
    assert state_of(m.module).keys() == before
    for name, folder in (("v1.5", loose), ("a", made["a"])):
        assert engine.generate(text, GREEDY, adapters=name)[0].token_ids == alone(base, folder, text)


def test_stacks_that_are_kept_for_later_change_nothing(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), more_adapters=True), prompts(1)
    reserve_stacks(engine.model.module, engine.adapters.selection)
    assert engine.generate(text, GREEDY)[0].token_ids == alone(base, None, text)
    engine.adapters.add("a", made["a"])
    assert engine.generate(text, GREEDY, adapters="a")[0].token_ids == alone(base, made["a"], text)


def broken(adapter: Path, out: Path, change) -> Path:
    """A copy of a PEFT directory without a record of its base, whose tensors `change` changes in place."""
    shutil.copytree(adapter, out)
    (out / BASE).unlink()
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize("places", [1, 2])
def test_tensors_that_do_not_fit_are_refused_when_they_come(served, tmp_path, places):
    """Also where all places in memory are taken, so that the adapter would be put there for a later request. One column would be
    broadcast without a word."""
    base, made = served
    engine, (text,) = (
        Engine(load_model(base), adapters={"a": made["a"]}, more_adapters=True, max_adapters=places),
        prompts(1),
    )
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    for number, (part, size, said) in enumerate(
        (
            ("A", (3, 53), r"has shape \(3, 53\), the model needs \(3, 48\)"),
            ("A", (3, 1), "has shape"),
            ("B", (1, 3), "has shape"),
        )
    ):
        wrong = broken(
            made["a"],
            tmp_path / str(number),
            lambda t, part=part, size=size: t.update({f"{name}{part}.weight": torch.ones(size)}),
        )
        with pytest.raises(ArtifactError, match=said):
            engine.adapters.add("x", wrong)
    assert engine.adapters.names == ("a",)
    assert engine.generate(text, GREEDY, adapters="a")[0].token_ids == alone(base, made["a"], text)


@pytest.mark.parametrize("what", ["A", "B", "rank"])
def test_halves_of_a_product_and_another_rank_are_refused(served, tmp_path, what):
    base, made = served
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"

    def change(tensors):
        if what == "rank":
            tensors |= {f"{name}A.weight": torch.ones(5, 48), f"{name}B.weight": torch.ones(32, 5)}
        else:
            del tensors[f"{name}{what}.weight"]

    said = "has rank 3 for .*down_proj, whose lora_A .* has 5" if what == "rank" else f"lacks the tensor {name}{what}"
    with pytest.raises(ArtifactError, match=said):
        load_model(base, adapter=broken(made["a"], tmp_path / "x", change))


def test_an_adapter_that_fails_late_ends_its_own_request_alone(served, monkeypatch, capsys):
    """By an error that nothing foresaw: nobody waits for it, and what runs goes on."""
    base, made = served
    engine, texts = Engine(load_model(base), adapters=made, more_adapters=True, max_adapters=1), prompts(3)
    other = begun(engine, texts[0], "")
    late = engine.request(texts[1], GREEDY)
    engine.use_adapter(late, "b")
    engine.submit(late)

    def fails(*_):
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patched:
        patched.setattr(adapters, "add_to_banks", fails)
        assert finished(engine, other) == alone(base, None, texts[0])
    assert isinstance(late.error, RuntimeError) and "the adapter b can't be put" in capsys.readouterr().err
    assert engine.generate(texts[1], GREEDY, adapters="b")[0].token_ids == alone(base, made["b"], texts[1])


def test_names_of_an_engine_are_its_adapters_own(served):
    base, made = served
    for name in ("", "base"):
        with pytest.raises(DataError, match="a name of its own"):
            Engine(load_model(base), adapters={name: made["a"]})


def test_another_base_than_in_training_is_said_whichever_came_first(served, tmp_path, capsys, monkeypatch):
    """A model that was packed for its first adapters, and one that comes for the floats."""
    monkeypatch.setattr(log, "_warned", set())
    base, made = served
    packed = write_adapter(base, LoRA(rank=2, base="nf4"), tmp_path / "packed")
    engine = Engine(load_model(base), adapters={"p": packed}, more_adapters=True)
    capsys.readouterr()
    engine.adapters.add("q", packed)
    assert not capsys.readouterr().err
    engine.adapters.add("a", made["a"])
    assert "the adapter a was trained over weights in float, and is served by name over those of base in nf4" in (
        " ".join(capsys.readouterr().err.split())
    )
    with pytest.raises(UnsupportedError, match="those of the model are packed: serve it over weights in floats"):
        engine.adapters.add("c", made["c"])


# The routes -----------------------------------------------------------------------------------------------

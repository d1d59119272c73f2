"""Several adapters over one model: each request gets what the model with its adapter alone gives."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import write_checkpoint

from luban import Engine, Sampling, load_model
from luban.adapters.bank import bankable
from luban.adapters.dora import DoRA
from luban.adapters.lora import LoRA
from luban.checkpoint.weights import weights_hash
from luban.core.errors import DataError, LineageError, UnsupportedError, UsageError
from luban.load.adapted import ActiveAdapter, put_in
from luban.load.adapter_export import export_adapter
from luban.models.build import build_model, state_of
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.serve.adapters import by_name

SPEC = uniform(
    vocab_size=272,
    width=32,
    layers=2,
    context=64,
    mixer=Grouped(heads=4, kv_heads=2),
    feedforward=SwiGLU(width=48),
    init=NormalInit(std=0.3),
)
KINDS = {"a": LoRA(rank=3), "b": LoRA(rank=2, targets=("q", "down")), "c": DoRA(rank=2)}
GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model and three adapters for it."""
    folder = tmp_path_factory.mktemp("served")
    base, made = write_checkpoint(folder / "base", SPEC, seed=3), {}
    for name, config in KINDS.items():
        made[name] = write_adapter(base, config, folder / name)
    return base, made


def write_adapter(base: Path, config, out: Path) -> Path:
    m = load_model(base)
    weights = state_of(m.module)
    found = weights_hash(weights)
    put_in(m.module, config, config.initial(m.spec, weights, 1), "test")
    with torch.no_grad():
        for parameter in m.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    export_adapter(replace(m, adapter=ActiveAdapter(config, str(base), found)), out)
    return out


def prompts(count: int) -> list[list[int]]:
    rng = random.SystemRandom()
    common = [rng.randrange(20, 270) for _ in range(18)]
    return [[*common, *(rng.randrange(20, 270) for _ in range(rng.randrange(1, 6)))] for _ in range(count)]


def alone(base, adapter, prompt) -> list[int]:
    return Engine(load_model(base, adapter=adapter), max_batch=2).generate(prompt, GREEDY)[0].token_ids


def test_requests_of_one_batch_have_their_own_adapters(served):
    """And prompts that begin alike share no keys and values across adapters, in the second round neither."""
    base, made = served
    engine, texts = Engine(load_model(base), adapters=made), prompts(6)
    names = ["a", "", "b", "c", "a", ""]
    wanted = [alone(base, made.get(name), text) for name, text in zip(names, texts, strict=True)]
    for _ in range(2):
        results = engine.generate(texts, GREEDY, adapters=names)
        assert [result.token_ids for result in results] == wanted
    first = alone(base, made["b"], texts[0])
    assert engine.generate(texts[0], GREEDY, adapters="b")[0].token_ids == first
    assert first != wanted[0]


def test_the_least_recently_used_adapter_goes(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters=made, max_adapters=2), prompts(1)
    assert engine.adapters is not None
    first = {name: engine.generate(text, GREEDY, adapters=name)[0].token_ids for name in ("a", "b")}
    engine.generate(text, GREEDY, adapters="a")
    engine.generate(text, GREEDY, adapters="c")
    assert engine.adapters.held == ["a", "c"]
    assert engine.generate(text, GREEDY, adapters="b")[0].token_ids == first["b"]
    assert engine.adapters.held == ["c", "b"]
    for name in ("c", "b"):
        engine.adapters.drop(name)
    assert not [name for name, _ in engine.model.module.named_modules() if "adapters" in name]


def test_what_can_not_be_served_by_name_is_refused(served, tmp_path):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters=made), prompts(1)
    with pytest.raises(DataError, match="there is no adapter 'd'"):
        engine.generate(text, GREEDY, adapters="d")
    with pytest.raises(DataError, match="made without adapters"):
        Engine(load_model(base)).generate(text, GREEDY, adapters="a")
    other = write_checkpoint(tmp_path / "other", SPEC, seed=4)
    with pytest.raises(LineageError, match="trained over a model with weights_hash"):
        Engine(load_model(other), adapters=made).generate(text, GREEDY, adapters="a")
    whole = write_adapter(base, LoRA(rank=2, targets=("q", "lm_head")), tmp_path / "head")
    with pytest.raises(UnsupportedError, match="changes more than the layers' projections"):
        Engine(load_model(base), adapters={"h": whole}).generate(text, GREEDY, adapters="h")


def test_one_adapter_under_two_names(served):
    """Whichever name was read last or has gone, the other one still has it."""
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters={"x": made["a"], "y": made["a"]}), prompts(1)
    wanted = alone(base, made["a"], text)
    assert wanted != alone(base, None, text)
    assert engine.adapters is not None
    for name in ("x", "y"):
        assert engine.generate(text, GREEDY, adapters=name)[0].token_ids == wanted
    engine.adapters.drop("y")
    assert engine.generate(text, GREEDY, adapters="x")[0].token_ids == wanted


def test_whatever_runs_the_model_between_steps_runs_it_alone(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters=made), prompts(1)
    tokens = torch.tensor([text] * 2)
    with torch.inference_mode():
        wanted = engine.model.module(tokens, output="hidden")
        engine.generate(text, GREEDY, adapters="a")
        assert torch.equal(engine.model.module(tokens, output="hidden"), wanted)


def test_an_encoder_decoder_has_none_by_name():
    spec = uniform(vocab_size=50, width=16, layers=1, mixer=Grouped(heads=2), body=EncoderDecoderBody(decoder_start=1))
    with pytest.raises(UnsupportedError, match="its encoder and its decoder read different tokens"):
        bankable(LoRA(rank=2), build_model(spec, device="meta"), "a")


def test_names_on_the_command_line():
    assert by_name(["x=runs/x", "y=runs/y"]) == (None, {"x": "runs/x", "y": "runs/y"})
    assert by_name(["runs/x"]) == ("runs/x", {}) and by_name([]) == (None, {})
    for given in (["runs/x", "runs/y"], ["runs/x", "y=runs/y"]):
        with pytest.raises(UsageError, match="need names"):
            by_name(given)

"""Several adapters over one model: each request gets what the model with its adapter gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapted_models import GREEDY, SPEC, alone, prompts, write_adapted, write_adapter
from tiny_models import write_checkpoint

from luban import Engine, load_model
from luban.adapters.ia3 import IA3
from luban.adapters.llama_adapter import LLaMAAdapter
from luban.adapters.lora import LoRA
from luban.adapters.parallel import Parallel
from luban.adapters.pissa import PiSSA
from luban.adapters.prefix import PrefixTuning, PTuningV2
from luban.adapters.prompt import PromptTuning
from luban.adapters.series import Houlsby, Pfeiffer
from luban.core.errors import ArtifactError, DataError, LineageError, UnsupportedError, UsageError
from luban.load.adapted import StoredAdapter, put_in
from luban.models.build import build_model, state_of
from luban.nn.packed import KINDS, pack_frozen, packed_kind
from luban.serve import adapters
from luban.serve.adapter_names import by_name


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model and three adapters for it."""
    return write_adapted(tmp_path_factory.mktemp("served"))


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


def test_what_reads_weights_is_refused_over_int8(served, tmp_path):
    """DoRA divides by norms of the weights. (IA)³ of a gated network reads none, and is what it is alone."""
    base, made = served
    with pytest.raises(
        UnsupportedError, match=r"the adapter of c at .*qkv.q reads the weight .* leave --dtype int8 out"
    ):
        load_model(base, dtype="int8", adapter=made["c"])
    with pytest.raises(UnsupportedError, match="those of the model are packed"):
        Engine(load_model(base, dtype="int8"), adapters={"c": made["c"]})
    gains = {"i": write_adapter(base, IA3(), tmp_path / "i")}
    engine, (text,) = Engine(load_model(base, dtype="int8"), adapters=gains), prompts(1)
    wanted = Engine(load_model(base, dtype="int8", adapter=tmp_path / "i")).generate(text, GREEDY)[0].token_ids
    assert engine.generate(text, GREEDY, adapters="i")[0].token_ids == wanted


def test_adapters_over_one_packed_model_share_it(served, tmp_path, capsys):
    """What each computes alone, over weights that are packed once; among others, or batch-invariant, over floats, with a warning."""
    base, made = served
    kinds = {"a": LoRA(rank=3, base="nf4"), "b": LoRA(rank=2, targets=("q", "down"), base="nf4"), "i": IA3(base="nf4")}
    packed = {name: write_adapter(base, config, tmp_path / name) for name, config in kinds.items()}
    engine, texts = Engine(load_model(base), adapters=packed, max_adapters=2), prompts(5)
    assert "trained over weights in nf4, so base is kept in nf4 once for all of them" in capsys.readouterr().err
    assert packed_kind(engine.model.module) == "nf4"
    plain = load_model(base)
    pack_frozen(plain.module.requires_grad_(False), KINDS["nf4"])
    floats = Engine(load_model(base)).generate(texts, GREEDY)
    for _ in range(2):
        results = engine.generate(texts, GREEDY, adapters=["a", "b", "", "i", "a"])
        wanted = [alone(base, packed[name], text) for name, text in zip(("a", "b"), texts, strict=False)]
        wanted += [Engine(plain).generate(texts[2], GREEDY)[0].token_ids]
        wanted += [alone(base, packed[name], text) for name, text in zip(("i", "a"), texts[3:], strict=True)]
        assert [result.token_ids for result in results] == wanted
    assert [result.token_ids for result in floats] != wanted
    assert "answers differ somewhat" not in capsys.readouterr().err
    for given in (
        {"adapters": {**packed, "c": made["c"]}},
        {"adapters": {"invariant": packed["b"]}, "batch_invariant": True},
    ):
        mixed = Engine(load_model(base), **given)
        assert packed_kind(mixed.model.module) is None
        said = f"the adapter {next(iter(given['adapters']))} was trained over weights in nf4, and is served by name"
        assert said in capsys.readouterr().err


def test_a_model_has_the_adapters_of_one_engine(served, tmp_path):
    """A second engine would meet those of the first; one that wasn't made leaves none behind."""
    base, made = served
    m, (text,) = load_model(base), prompts(1)
    head = write_adapter(base, LoRA(rank=2, targets=("lm_head",)), tmp_path / "head")
    with pytest.raises(UnsupportedError, match="changes more than the layers' projections"):
        Engine(m, adapters={"a": made["a"], "c": made["c"], "h": head})
    engine = Engine(m, adapters=made)
    with pytest.raises(UsageError, match="base serves the adapters of another engine: load the model again"):
        Engine(m, adapters=made)
    assert engine.generate(text, GREEDY, adapters="a")[0].token_ids == alone(base, made["a"], text)


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


def test_running_requests_use_no_more_adapters_than_fit(served):
    """A request whose adapter doesn't fit beside those in use waits, and gets what it would alone."""
    base, made = served
    engine, texts = Engine(load_model(base), adapters=made, max_adapters=1), prompts(4)
    names, most = ["a", "b", "", "a"], 0
    requests = [engine.request(text, GREEDY) for text in texts]
    for request, name in zip(requests, names, strict=True):
        engine.use_adapter(request, name)
        engine.submit(request)
    while engine.step():
        assert engine.adapters is not None
        most = max(most, len(engine.adapters.held))
    wanted = [alone(base, made.get(name), text) for name, text in zip(names, texts, strict=True)]
    assert [request.result.choices[0].token_ids for request in requests] == wanted and most == 1


def test_two_names_of_one_adapter(served):
    """Each is used where it was asked for, also after the other was evicted."""
    base, made = served
    known = {"x": made["a"], "y": made["a"], "z": made["b"]}
    engine, (text,) = Engine(load_model(base), adapters=known, max_adapters=2), prompts(1)
    wanted = {name: alone(base, folder, text) for name, folder in known.items()}
    for name in ("x", "y", "x", "z", "x", "y"):
        assert engine.generate(text, GREEDY, adapters=name)[0].token_ids == wanted[name], name


def test_by_the_name_of_a_model_through_the_api(served):
    testing = pytest.importorskip("fastapi.testclient", reason="the HTTP interface (extra serve)")
    from luban.serve.api.app import create_app

    base, made = served
    engine, texts = Engine(load_model(base), adapters=made), prompts(3)
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with testing.TestClient(create_app(engine), base_url="http://localhost") as client:
        listed = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert listed == [engine.model.name, *made]
        for name, text in zip(("", "a", "c"), texts, strict=True):
            asked = client.post("/v1/completions", json={**body, "model": name or engine.model.name, "prompt": text})
            wanted = Engine(load_model(base, adapter=made.get(name))).generate(text, GREEDY)[0].text
            assert asked.json()["choices"][0]["text"] == wanted, name
        unknown = client.post("/v1/completions", json={**body, "model": "d", "prompt": texts[0]})
        assert unknown.status_code == 404 and "'a'" in unknown.json()["error"]["message"]


OTHERS = {  # kinds without a row above: served by name, or the reason why not
    "pissa": (PiSSA(rank=2), ""),
    "ia3": (IA3(), ""),
    "houlsby without norms": (Houlsby(width=4, modules_to_save=()), ""),
    "pfeiffer": (Pfeiffer(width=4), ""),
    "houlsby": (Houlsby(width=4), "it replaces whole modules .norm"),
    "parallel": (Parallel(width=4), "changes more than the layers' projections"),
    "llama_adapter": (LLaMAAdapter(length=3), "changes more than the layers' projections"),
    "prefix": (PrefixTuning(length=3, network=8), "keys and values before every text"),
    "p_tuning_v2": (PTuningV2(length=3), "keys and values before every text"),
    "prompt": (PromptTuning(length=3), "keys and values before every text"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_alone_and_by_name(name, served, monkeypatch, capsys):
    """Alone, what a forward of the adapted model gives token by token; by name the same, or a reason why not, which the
    engine tells when it starts, too."""
    config, reason = OTHERS[name]
    base, _ = served
    m, (text,) = load_model(base), prompts(1)
    weights = state_of(m.module)
    config.adapt(twin := build_model(SPEC, device="meta"))
    whole = {n: weights[n] for n, p in twin.named_parameters() if p.requires_grad and n in weights}
    tensors = config.initial(SPEC, weights, 1) | whole
    tensors = {
        n: t + 0.3 * torch.randn_like(t) if n in dict(twin.named_parameters()) else t for n, t in tensors.items()
    }
    put_in(m.module, config, tensors, "test")
    ids = list(text)
    with torch.no_grad():
        for _ in range(GREEDY.max_tokens):
            ids.append(int(m.module(torch.tensor([ids]))[0, -1].argmax()))
    assert Engine(m).generate(text, GREEDY)[0].token_ids == ids[len(text) :]
    stored = StoredAdapter(path=base, config=config, tensors=tensors)
    monkeypatch.setattr(adapters, "find_adapter", lambda path: stored)
    monkeypatch.setattr(adapters, "base_kept", lambda path: "float")
    if not reason:
        engine = Engine(load_model(base), adapters={"x": base})
        assert engine.generate(text, GREEDY, adapters="x")[0].token_ids == ids[len(text) :]
        return
    with pytest.raises(UnsupportedError, match=f"the adapter x can't share a batch with others: .*{reason}"):
        Engine(load_model(base), adapters={"x": base})


def test_what_can_not_be_served_by_name_is_refused(served, tmp_path, tiny_translator):
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
    with pytest.raises(UnsupportedError, match="has an encoder"):
        Engine(load_model(tiny_translator), adapters=made)


@pytest.mark.parametrize("most", [16, 1])
def test_an_adapter_that_is_not_there_is_said_when_the_engine_starts(served, tmp_path, most):
    """Also one that isn't read yet, since others fill the places in memory."""
    base, made = served
    with pytest.raises(ArtifactError, match="nothere does not exist"):
        Engine(load_model(base), adapters={"a": made["a"], "n": tmp_path / "nothere"}, max_adapters=most)


def test_whatever_runs_the_model_between_steps_runs_it_alone(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters=made), prompts(1)
    tokens = torch.tensor([text] * 2)
    with torch.inference_mode():
        wanted = engine.model.module(tokens, output="hidden")
        engine.generate(text, GREEDY, adapters="a")
        assert torch.equal(engine.model.module(tokens, output="hidden"), wanted)


def test_names_on_the_command_line():
    assert by_name(["x=runs/x", "y=runs/y"]) == (None, {"x": "runs/x", "y": "runs/y"})
    assert by_name(["runs/x"]) == ("runs/x", {}) and by_name([]) == (None, {})
    for given in (["runs/x", "runs/y"], ["runs/x", "y=runs/y"]):
        with pytest.raises(UsageError, match="need names"):
            by_name(given)

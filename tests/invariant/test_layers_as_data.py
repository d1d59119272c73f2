"""A model whose layers differ is a model like any other: it trains, resumes, generates, compiles and is written down."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import drawn
from families import FAMILIES, VOCAB, Family, engine_of, packed_batch
from torch._dynamo.testing import CompileCounterWithBackend
from training_data import tensors

from luban.checkpoint.checkpoint import Checkpoint, load_checkpoint
from luban.checkpoint.saver import save_checkpoint
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence, Session
from luban.models.build import build_model
from luban.models.config import config_of, resolve_spec
from luban.models.spec import ModelSpec, read_spec, spec_from_dict, spec_to_dict, write_spec
from luban.objectives.causal import Causal
from luban.objectives.masked import Masked
from luban.parallel.compile import compiled_loss

TABLE = {
    "width": 32,
    "context": 48,
    "layers": 6,
    "init": {"type": "normal", "std": 0.2},
    "layer": {"mixer": {"heads": 4, "kv_heads": 2}, "feedforward": {"width": 48}},
    "pattern": [{"every": 2, "mixer": {"window": 3}}, {"at": [1, 4], "feedforward": {"width": 40}}],
}


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


def mixed(**changes) -> ModelSpec:
    return resolve_spec({**TABLE, **changes}, VOCAB)


def family_of(spec: ModelSpec) -> Family:
    return Family(spec, Causal(), packed_batch)


def shapes(spec: ModelSpec) -> list[tuple[int | None, int]]:
    return [(layer.mixer.window, layer.feedforward.width) for layer in spec.layers]


def test_patterns_say_which_layers_differ_and_survive_being_written(tmp_path):
    spec = mixed()
    assert shapes(spec) == [(3, 48), (None, 40), (3, 48), (None, 48), (3, 40), (None, 48)]
    write_spec(spec, tmp_path)
    assert read_spec(tmp_path) == spec
    stored = json.loads((tmp_path / "spec.json").read_text())["layers"]
    assert stored["index"] == [0, 1, 0, 2, 3, 2] and len(stored["distinct"]) == 4
    assert resolve_spec(json.loads(json.dumps(config_of(spec))), VOCAB) == spec
    assert shapes(mixed(layers=2, pattern=[])) == [(None, 48)] * 2


def test_trains_and_goes_on_from_a_checkpoint_bit_by_bit(tmp_path, seed):
    family, rng = family_of(mixed()), np.random.default_rng(seed)
    batches = [packed_batch(4, rng)] * 6
    whole = engine_of(family, seed=seed)
    losses = [whole.step(batch).loss for batch in batches]
    assert losses[-1] < losses[0]
    first = engine_of(family, seed=seed)
    for batch in batches[:3]:
        first.step(batch)
    state = first.state_dict()
    save_checkpoint(tmp_path / "half", Checkpoint(spec=spec_to_dict(family.spec), **state))
    stored = load_checkpoint(tmp_path / "half")
    second = engine_of(Family(spec_from_dict(stored.spec), Causal(), packed_batch), seed=seed + 1)
    second.load_state_dict({"model": stored.model, "optimizer": stored.optimizer})
    assert [second.step(batch).loss for batch in batches[3:]] == losses[3:]
    for name, weight in second.state_dict()["model"].items():
        assert torch.equal(weight, whole.state_dict()["model"][name]), name


def test_generates_with_a_cache_as_without(seed):
    """Three times as many tokens as a window holds; prompts of two lengths, so that one is padded."""
    model = build_model(mixed(), dtype="float64", seed=seed)
    prompts = torch.randint(0, VOCAB, (2, 5)).tolist()
    sequences = [Sequence(prompt, Sampling(temperature=0), seed=0) for prompt in (prompts[0], prompts[1][:3])]
    session = Session(model)
    session.add(sequences)
    for _ in range(9):
        session.choose()
        session.advance(sequences)
        for sequence, logits in zip(sequences, session.logits, strict=True):
            with torch.no_grad():
                whole = model(torch.tensor([sequence.prompt + sequence.tokens]))[0, -1]
            torch.testing.assert_close(logits, whole.float(), rtol=1e-5, atol=1e-6)


def batches(packed: bool, seed: int) -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    whole = {} if packed else {"documents": None, "positions": None}
    return [tensors(packed_batch(2, rng)) | whole for _ in range(2)]


@pytest.mark.parametrize(
    ("distinct", "packed"),
    drawn([(distinct, packed) for distinct in (1, 4, 12) for packed in (False, True)], 2),
)
def test_compiles_a_graph_for_each_distinct_layer(distinct, packed, monkeypatch, seed):
    """Twenty-four layers, two training steps. Where rows are packed, a window changes nothing but a mask that is written
    out anyway, so that layers of one width share a graph."""
    ways = [
        {"mixer": {"window": window}, "feedforward": {"width": width}}
        for window, width in itertools.product(("none", 3), (48, 40, 32, 24, 56, 64))
    ][:: 12 // distinct]
    spec = mixed(layers=24, pattern=[{"every": distinct, "offset": i, **way} for i, way in enumerate(ways)])
    assert len(set(spec.layers)) == distinct
    torch._dynamo.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), torch.compile
    found = []
    for run in ("compiled", "plain"):
        loss = Causal().loss(build_model(spec, seed=seed))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, **given: plain(f, **{**given, "backend": counter}))
            function = compiled_loss(loss, regions=True) if run == "compiled" else loss
        for batch in batches(packed, seed):
            function(batch).sum.backward()
        found.append([p.grad for p in loss.parameters()])
    widths = {layer.feedforward.width for layer in spec.layers}
    assert counter.frame_count - 1 == (len(widths) if packed else distinct)  # one more is the norm behind the stack
    for got, right in zip(*found, strict=True):
        assert (got - right).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize("shared", [[None, 0, 0, 0], [None, None, 0, 1], [None, 0, None, 2]])
def test_shared_layers_are_one_set_of_parameters_everywhere(shared, tmp_path, seed):
    """ALBERT's groups: the same as layers of their own with equal weights, whose gradients add up."""
    albert = FAMILIES["albert"].spec
    spec = replace(albert, layers=tuple(replace(albert.layers[0], share=share) for share in shared))
    write_spec(spec, tmp_path)
    assert read_spec(tmp_path) == spec
    assert resolve_spec(json.loads(json.dumps(config_of(spec))), VOCAB) == spec
    apart = replace(spec, layers=(albert.layers[0],) * 4)
    one, many = (Masked().loss(build_model(each, dtype="float64", seed=seed)) for each in (spec, apart))
    assert sum(p.numel() for p in one.parameters()) == spec.parameters < apart.parameters
    owner = {i: i if share is None else share for i, share in enumerate(shared)}
    state = one.state_dict()
    many.load_state_dict({name: state[_shared(name, owner)] for name in many.state_dict()})
    batch = tensors(packed_batch(2, np.random.default_rng(seed)))
    totals = [loss(batch).sum for loss in (one, many)]
    torch.testing.assert_close(*totals)
    for total in totals:
        total.backward()
    sums: dict[str, torch.Tensor] = {}
    for name, parameter in many.named_parameters():
        key = _shared(name, owner)
        sums[key] = sums.get(key, 0) + parameter.grad
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], msg=name)


def _shared(name: str, owner: dict[int, int]) -> str:
    """The name under which the parameter of a layer is kept."""
    head, _, tail = name.partition(".blocks.")
    index, _, rest = tail.partition(".")
    return f"{head}.blocks.{owner[int(index)]}.{rest}" if tail else name

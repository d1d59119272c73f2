"""Specifications: round trips, refusals, initialisation."""

from __future__ import annotations

import json
import tomllib

import pytest
import torch

from luban import ModelSpec, build_model
from luban.core.config import from_dict, to_toml
from luban.core.errors import ArtifactError, ConfigError
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.config import config_of, resolve_spec
from luban.models.elmo import ElmoBody
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.presets import PRESETS, preset
from luban.models.recurrent import RecurrentBody
from luban.models.spec import FORMAT, read_spec, spec_from_dict, uniform, write_spec
from luban.nn.init import FanInInit, NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.falcon_alibi import FalconAlibi
from luban.nn.position.logn import LogN
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.two_dimensional import Rope2D


@pytest.mark.parametrize("name", PRESETS)
def test_survives_json(name, tmp_path):
    write_spec(PRESETS[name], tmp_path)
    assert read_spec(tmp_path) == PRESETS[name]
    assert resolve_spec(json.loads(json.dumps(config_of(PRESETS[name]))), PRESETS[name].vocab_size) == PRESETS[name]
    toml = tomllib.loads(to_toml(config_of(PRESETS[name])))
    assert resolve_spec(toml, PRESETS[name].vocab_size) == PRESETS[name]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: uniform(width=30), "width 30 can't be split over 8 heads"),
        (lambda: uniform(layers=0), "layers must be at least 1"),
        (lambda: Grouped(heads=6, kv_heads=4), "kv_heads must divide heads"),
        (lambda: uniform(mixer=Grouped(heads=2, head_dim=5)), "rotary width 5 must be even"),
        (lambda: uniform(position=Rope(width=64)), "at most the head width 32"),
        (lambda: RMSNorm(eps=0), "eps must be positive"),
        (lambda: from_dict(ModelSpec, {"widht": 3}), "did you mean 'width'"),
        (lambda: from_dict(ModelSpec, {"position": {"type": "rop"}}), "did you mean 'rope'"),
        (lambda: preset("llama-7"), "did you mean 'llama-7b'"),
        (lambda: build_model(uniform(), dtype="float8"), "unknown precision 'float8'"),
    ],
)
def test_refuses_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_a_folder_without_a_spec_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no spec\.json"):
        read_spec(tmp_path)
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "was written by Luban before 0.2"),
        ({"format": None}, "was written by Luban before 0.2"),
        ({"format": FORMAT + 1}, rf"has format {FORMAT + 1}, of a newer Luban; this version reads format {FORMAT}"),
        ({"layers": ...}, "is damaged: it has no field 'layers'"),
        ({"layers": 3}, "is damaged: a field holds a value of another type"),
        ({"wdith": 3}, r"unknown field '.*spec.json.wdith' \(did you mean 'width'\?\)"),
    ],
)
def test_a_spec_of_another_form_is_refused_in_words(tmp_path, change, words):
    write_spec(uniform(), tmp_path)
    data = json.loads((tmp_path / "spec.json").read_text()) | change
    data = {name: value for name, value in data.items() if value is not ...}
    (tmp_path / "spec.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=words):
        read_spec(tmp_path)
    if "format" in change:
        del data["format"]
        with pytest.raises(ConfigError, match=r"before 0\.2"):
            spec_from_dict(data)


def test_initialisation_depends_on_seed_and_name_alone():
    shallow, deep = (
        uniform(vocab_size=50, width=16, layers=n, mixer=Grouped(heads=2), init=NormalInit(scale_residual=False))
        for n in (1, 3)
    )
    a, b, c = build_model(shallow, seed=4), build_model(deep, seed=4), build_model(deep, seed=5)
    names = dict(b.named_parameters())
    assert all(torch.equal(p, names[name]) for name, p in a.named_parameters())
    assert not torch.equal(b.decoder.embedding.tokens.weight, c.decoder.embedding.tokens.weight)
    assert not torch.equal(b.decoder.blocks["0"].mixer.qkv.q.weight, b.decoder.blocks["1"].mixer.qkv.q.weight)
    half = build_model(deep, seed=4, dtype="bfloat16")
    assert torch.equal(half.decoder.embedding.tokens.weight, b.decoder.embedding.tokens.weight.bfloat16())


def test_initial_deviations():
    spec = uniform(vocab_size=4096, width=256, layers=8, init=NormalInit(std=0.05))
    model = build_model(spec)
    block = model.decoder.blocks["3"]
    assert block.mixer.qkv.q.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert block.feedforward.down.weight.std().item() == pytest.approx(0.05 / 4, rel=0.02)  # √(2·8)
    assert torch.equal(block.mixer_norm.weight, torch.ones(256))
    fan_in = build_model(uniform(init=FanInInit(scale_residual=False))).decoder.blocks["0"].feedforward.down.weight
    assert fan_in.std().item() == pytest.approx(768**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": RecurrentBody(), "position": Alibi(), "layers": None}, "a body of type recurrent has no position"),
        ({"body": ElmoBody(), "arrangement": PostNorm(), "layers": None}, "a body of type elmo has no arrangement"),
        ({"body": ElmoBody()}, "a body of type elmo has no layers"),
        ({"body": EncoderBody(), "position": FalconAlibi()}, "needs a causal model"),
        ({"body": EncoderDecoderBody(), "position": LogN(trained=8)}, "needs a causal model"),
        ({"body": EncoderDecoderBody(), "arrangement": Parallel()}, "doesn't support cross-attention"),
        ({"mixer": Grouped(heads=2, head_dim=6), "position": Rope2D()}, "a width that 4 divides, 6 given"),
        ({"mixer": Grouped(heads=3)}, "can't be split over 3 heads"),
        ({"position": Randomised(longest=8)}, "longest ≥ the context of 16"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigError, match=message):
        uniform(**{"vocab_size": 31, "width": 16, "layers": 2, "context": 16, **changes})

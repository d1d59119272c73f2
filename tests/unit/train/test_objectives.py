"""Objectives in the training loop: they learn, resume bitwise, and refuse models that they can't train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from drawn import drawn
from safetensors.torch import load_file

import luban
import luban.core.log
from luban.core.errors import ConfigError
from luban.data.shards import Shards
from luban.nn.position.base import Position
from luban.train.pretrain import pretrain

ENCODER = {
    "body": {"type": "encoder", "segments": 2},
    "head": {"type": "masked_lm", "pair": True},
    "position": {"type": "learned"},
}


WINDOWS = {"encoder": {"layers": 2, "layer": {"mixer": {"window": 5}}}, "layer": {"mixer": {"window": 3}}}


def losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (ENCODER, {"type": "masked"}),
        (ENCODER, {"type": "masked", "pairing": {"type": "next_sentence"}}),
        ({"position": {"type": "learned"}}, {"type": "prefix"}),
    ],
    ids=["masked", "masked-pairs", "prefix"],
)
def test_trains_and_resumes_bitwise(tiny, tmp_path, model, objective):
    changes = {"model": model, "objective": objective, "optim": {"type": "adamw", "lr": 0.01}}
    whole = pretrain(tiny(**changes), tmp_path / "whole", "whole")
    assert losses(whole)[-1] < losses(whole)[0]
    cut = tiny(**changes, train={"accumulate": 2})
    halves = pretrain(cut, tmp_path / "halves", "halves")
    assert losses(halves) == pytest.approx(losses(whole), rel=2e-3)  # micro-batches change nothing but rounding
    again = pretrain(tiny(**changes), tmp_path / "again", "again")
    one, two = (load_file(run / "checkpoints" / "step_000006" / "model.safetensors") for run in (whole, again))
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("sides", [{}, WINDOWS], ids=["dense", "windows"])
def test_an_encoder_decoder_answers_as_it_was_trained_to_begin(tiny, tmp_path, sides):
    """What an objective begins the decoder with is in the run's specification, so that the run writes text."""
    model = {"body": {"type": "encoder_decoder"}, "position": {"type": "learned"}, **sides}
    objective = {"type": "span_corruption", "sentinels": 20}
    run = pretrain(tiny(model=model, objective=objective), tmp_path / "run", "run")
    loaded, shards = luban.load_model(run), Shards.open(Path(tiny().data.path))
    windows = (
        {layer.mixer.window for layer in loaded.spec.encoder},
        {layer.mixer.window for layer in loaded.spec.layers},
    )
    assert windows == (({5}, {3}) if sides else ({None}, {None}))
    assert loaded.spec.body.decoder_start == shards.pad_id
    assert loaded.ends_with_eos
    result = luban.Engine(loaded).generate("ab ab", luban.Sampling(max_tokens=3, temperature=0, ignore_eos=True))[0]
    assert result.prompt_token_ids[-1] == loaded.tokenizer.eos_id
    assert len(result.token_ids) == 3
    tuned = pretrain(tiny(model=model, objective=objective, init=str(run)), tmp_path / "tuned", "tuned")
    assert luban.load_model(tuned).spec == loaded.spec


@pytest.mark.parametrize(
    ("model", "objective", "reason"),
    [
        (
            {},
            {"type": "masked"},
            "objective masked trains a model of body encoder with head masked_lm or language_model, "
            "and this one has body decoder and head language_model",
        ),
        (ENCODER, {"type": "causal"}, "objective causal trains a model of body decoder"),
    ],
)
def test_a_model_that_the_objective_cannot_train_is_refused(tiny, tmp_path, model, objective, reason):
    with pytest.raises(ConfigError, match=reason):
        pretrain(tiny(model=model, objective=objective), tmp_path / "run", "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("position", Position.registry)
def test_blank_infilling_trains_with_the_positions_that_can_and_names_them_for_the_others(tiny, tmp_path, position):
    recipe = tiny(model={"position": {"type": position}}, objective={"type": "blank_infilling"}, train={"steps": 1})
    if position in ("none", "rope_2d", "learned_2d"):
        assert losses(pretrain(recipe, tmp_path / "run"))[0] > 0
        return
    with pytest.raises(
        ConfigError, match=f"position method {position} can't take: use .*none or rope_2d or learned_2d"
    ):
        pretrain(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_next_sentence_needs_a_pair_output(tiny, tmp_path):
    plain = ENCODER | {"head": {"type": "masked_lm"}}
    with pytest.raises(ConfigError, match=r"model\.head\.pair = true"):
        pretrain(tiny(model=plain, objective={"type": "masked", "pairing": "next_sentence"}), tmp_path / "run", "run")
    assert not list(tmp_path.iterdir())


def test_a_batch_without_targets_is_told_once(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(luban.core.log, "_warned", set())
    objective = {"type": "masked", "rate": 1e-9}
    run = pretrain(tiny(model=ENCODER, objective=objective), tmp_path / "run", "run")
    assert set(losses(run)) == {0.0}
    assert capsys.readouterr().err.count("a batch had no token to predict, so its loss is logged as 0") == 1


@pytest.mark.parametrize(
    ("model", "objective"),
    drawn(
        [
            ({}, {"type": "causal", "smoothing": 0.1, "z_loss": 1e-3}),
            (ENCODER, {"type": "masked"}),
            (ENCODER, {"type": "masked", "pairing": {"type": "next_sentence"}}),
            ({"position": {"type": "learned"}}, {"type": "prefix"}),
            (
                {"body": {"type": "encoder_decoder"}, "position": {"type": "learned"}},
                {"type": "span_corruption", "sentinels": 20},
            ),
            ({"layer": {"mixer": {"layout": {"type": "strided", "block": 16, "window": 0, "stride": 2}}}}, {}),
        ],
        2,
    ),
    ids=["causal", "masked", "masked-pairs", "prefix", "encoder-decoder", "layout"],
)
def test_a_compiled_step_is_one_graph(tiny, tmp_path, monkeypatch, model, objective):
    """And its losses are those of the code as it stands."""
    compile_ = torch.compile

    def eager(function, *, fullgraph, **options):
        assert fullgraph
        return compile_(function, fullgraph=fullgraph, backend="aot_eager", **options)

    plain = pretrain(tiny(model=model, objective=objective, train={"steps": 2, "compile": False}), tmp_path / "plain")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", eager)
    run = pretrain(tiny(model=model, objective=objective, train={"steps": 2, "compile": True}), tmp_path / "run")
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)

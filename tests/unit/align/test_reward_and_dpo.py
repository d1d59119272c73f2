"""Reward models and preference losses through the trainer, from files of pairs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_byte_tokenizer

from luban import Engine, Sampling
from luban.adapters.lora import LoRA
from luban.align.dpo import DPORecipe, dpo
from luban.align.preferences import as_preference_shards, heldout_prompts
from luban.align.prompts import prompt_ids
from luban.align.reward import RewardRecipe, reward
from luban.align.scoring import RewardModel, score_file
from luban.checkpoint.weights import weights_hash
from luban.core.artifact import read_manifest
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, ConfigError, DataError, LineageError, UnsupportedError, UsageError
from luban.core.hashing import data_sha256
from luban.data.groups import Groups
from luban.data.shards import Shards
from luban.load.model import load_model
from luban.models.build import state_of
from luban.objectives.ranking import Ranking
from luban.tokenizer.tokenizer import load_tokenizer

TINY = {
    "optim": {"type": "adamw", "lr": 5e-3},
    "schedule": {"warmup": 0},
    "train": {"steps": 30, "batch_size": 8, "seq_len": 64, "device": "cpu", "log_every": 1},
    "checkpoint": {"every": 100},
    "validation": {"every": 0},
}


@pytest.fixture
def pairs(tmp_path) -> Path:
    """The answer of letters a is preferred to that of letters z."""
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"say {i}", "chosen": "a" * int(rng.integers(2, 5)), "rejected": "z" * int(rng.integers(2, 5))}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def rewarding(init: Path, pairs: Path) -> RewardRecipe:
    model = {"head": {"type": "value"}}
    return from_dict(RewardRecipe, {**TINY, "init": str(init), "model": model, "data": {"path": str(pairs)}})


def preferring(init: Path, pairs: Path, **method) -> DPORecipe:
    objective = {"type": "preference", "method": method or {"type": "dpo"}}
    return from_dict(DPORecipe, {**TINY, "init": str(init), "objective": objective, "data": {"path": str(pairs)}})


def rows_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_a_reward_model_learns_the_preference_and_scores_files(tiny_checkpoint, pairs, tmp_path):
    run = reward(rewarding(tiny_checkpoint, pairs), tmp_path / "rm")
    figures = read_manifest(run).figures
    assert figures["accuracy"] > 0.9 and figures["measured_on"] == "heldout" and figures["measured_at"] == 30
    assert (
        abs(figures["longer_wins"] - 0.5) <= 0.5 and sum(b["pairs"] for b in figures["calibration"]) == figures["pairs"]
    )
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"prompt": "say 99", "chosen": "aaa", "rejected": "zzz"}) + "\n")
    model = RewardModel.load(run)
    assert score_file(model, file, tmp_path / "scored.jsonl") == 1
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    assert scored["score"] > scored["rejected_score"]
    assert scored["score"] == pytest.approx(model.score("say 99", "aaa"), rel=1e-3)
    heldout = Shards.open(tmp_path / "rm.data" / next((tmp_path / "rm.data").iterdir()).name, "heldout")
    best = Groups.open(heldout).first[:-1]
    assert np.mean(model.scores([heldout.document(i).tolist() for i in best])) == pytest.approx(0, abs=1e-4)


def test_a_joint_model_ranks_and_writes(tiny_checkpoint, pairs, tmp_path):
    """Its language model is trained on preferred answers, and serves them; one that ranks alone writes nothing."""
    from safetensors.torch import load_file, save_file

    tied = tmp_path / "tied"
    shutil.copytree(tiny_checkpoint, tied)
    spec = json.loads((tied / "spec.json").read_text())
    (tied / "spec.json").write_text(json.dumps({**spec, "tied_head": True}))
    weights = {name: t for name, t in load_file(tied / "model.safetensors").items() if name != "head.weight"}
    save_file(weights, tied / "model.safetensors")
    recipe = rewarding(tied, pairs)
    few = replace(recipe, adapter=LoRA(rank=2), train=replace(recipe.train, steps=1), objective=Ranking(language=1.0))
    adapted = load_model(reward(few, tmp_path / "adapted"))  # its embedding isn't trained with the new head
    assert torch.equal(
        state_of(adapted.module)["decoder.embedding.tokens.weight"], weights["decoder.embedding.tokens.weight"]
    )
    run = reward(replace(recipe, objective=Ranking(language=1.0)), tmp_path / "joint")
    model = RewardModel.load(run)
    before = model.score("say 99", "aaa")
    assert before > model.score("say 99", "zzz")
    loaded = load_model(run)
    ids = prompt_ids("say 99", loaded.need_tokenizer())
    (found,) = Engine(loaded).generate(ids, Sampling(temperature=0, max_tokens=2))
    assert found.text == "aa" and loaded.spec.head != Engine(loaded).model.spec.head
    with torch.no_grad():
        logits = loaded.module.head.language_model(loaded.module(torch.tensor([ids]), output="hidden"))
    assert int(logits[0, -1].argmax()) == found.token_ids[0] and RewardModel.load(run).score("say 99", "aaa") == before
    with pytest.raises(UnsupportedError, match="has body decoder and head value"):
        Engine(load_model(reward(recipe, tmp_path / "alone")))


def test_an_adapter_trains_the_new_head_with_it(tiny_checkpoint, pairs, tmp_path):
    """A LoRA and the value head are saved, the model under them is not; the base's own hash is what tells them apart."""
    recipe = replace(rewarding(tiny_checkpoint, pairs), adapter=LoRA(rank=4))
    run = reward(recipe, tmp_path / "rm")
    figures = read_manifest(run).figures
    assert figures["accuracy"] > 0.9
    m, base = load_model(run), load_model(tiny_checkpoint)
    assert m.adapter.config.modules_to_save == ("head.output",)
    assert m.adapter.base_weights == weights_hash(state_of(base.module))
    kept, frozen = state_of(m.module), state_of(base.module)
    assert all(torch.equal(kept[name], tensor) for name, tensor in frozen.items() if not name.startswith("head."))
    held = {name for name in kept if ".adapters." in name or name.startswith("head.")}
    assert figures["parameters"] == sum(kept[name].numel() for name in held)
    over = load_model(tiny_checkpoint, adapter=run)
    x = torch.randint(16, 272, (2, 9))
    assert over.spec == m.spec and torch.equal(over.module(x), m.module(x))
    longer = replace(recipe, train=replace(recipe.train, steps=32))
    assert read_manifest(reward(longer, tmp_path / "rm")).figures["step"] == 32


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (LoRA(rank=2, targets=("qq",)), "adapter target 'qq' matches no projection of this model"),
        (LoRA(rank=2, targets=("lm_head",)), "adapter target 'lm_head' matches no projection of this model"),
        (LoRA(rank=999), "adapter.rank 999 is above the width of"),
        (LoRA(rank=2, base="nf4", modules_to_save=("o",)), "is trained, so its weights can't be packed"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_data_is_packed(
    adapter, said, tiny_checkpoint, pairs, tmp_path, monkeypatch
):
    def packs(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr("luban.align.reward.as_preference_shards", packs)
    with pytest.raises(ConfigError, match=said):
        reward(replace(rewarding(tiny_checkpoint, pairs), adapter=adapter), tmp_path / "rm")
    assert not (tmp_path / "rm").exists()


def test_scores_do_not_depend_on_the_batch(tiny_checkpoint, pairs, tmp_path):
    recipe = rewarding(tiny_checkpoint, pairs)
    run = reward(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "rm")
    model, rng = RewardModel.load(run), np.random.default_rng(1)
    texts = [rng.integers(16, 272, int(n)).tolist() for n in rng.integers(2, 40, 12)]
    assert model.scores(texts) == pytest.approx([model.scores([text])[0] for text in texts], abs=1e-4)
    with pytest.raises(DataError, match="longer than the context"):
        model.scores([[1] * 600])


def test_what_is_no_reward_model_or_reads_other_tokens_is_refused(tiny_checkpoint, pairs, tmp_path):
    with pytest.raises(UnsupportedError, match="train one with luban reward"):
        RewardModel.load(tiny_checkpoint)
    recipe = rewarding(tiny_checkpoint, pairs)
    run = reward(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "rm")
    tokenizer = load_model(tiny_checkpoint).tokenizer
    RewardModel.load(run).require_tokenizer(tokenizer, "policy")
    other = type(tokenizer)(
        tokenizer._model, replace(tokenizer.settings, chat_template="{{ messages }}"), path=None, content_hash="x"
    )
    with pytest.raises(LineageError, match="another chat template"):
        RewardModel.load(run).require_tokenizer(other, "policy")


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_preferred_answers_become_likelier_than_others(tiny_checkpoint, pairs, tmp_path, method):
    run = dpo(preferring(tiny_checkpoint, pairs, type=method), tmp_path / "run")
    rows = rows_of(run)
    assert np.mean([row["accuracy"] for row in rows[-5:]]) > 0.9
    if method == "dpo":
        assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # policy and reference are equal


def answer_logprob(model, ids: list[int], mask: np.ndarray) -> float:
    """Of the answer's tokens, by whole logits in float64."""
    tokens = torch.tensor([ids])
    logprobs = model.module(tokens).double().log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    return float(logprobs[torch.from_numpy(mask[1:] != 0)].sum().detach())


def test_held_out_accuracy_and_margin_are_those_of_the_held_out_pairs(tiny_checkpoint, pairs, tmp_path):
    recipe = preferring(tiny_checkpoint, pairs)
    recipe = replace(
        recipe,
        train=replace(recipe.train, steps=8),
        validation=replace(recipe.validation, every=4, batches=0),
    )
    run = dpo(recipe, tmp_path / "run")
    measured = [
        row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "heldout_loss" in row
    ]
    assert [row["step"] for row in measured] == [4, 8] and measured[1]["heldout_loss"] < measured[0]["heldout_loss"]
    heldout = Shards.open(next((tmp_path / "run.data").glob("preferences-*")), "heldout")
    policy, reference = load_model(run), load_model(tiny_checkpoint)
    margins = []
    for first in Groups.open(heldout).first[:-1]:
        chosen, rejected = (
            answer_logprob(policy, ids, mask) - answer_logprob(reference, ids, mask)
            for ids, mask in (
                (heldout.document(i).tolist(), np.asarray(heldout.mask[heldout.offsets[i] : heldout.offsets[i + 1]]))
                for i in (first, first + 1)
            )
        )
        margins.append(chosen - rejected)
    assert measured[1]["heldout_reward_margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert measured[1]["heldout_accuracy"] == np.mean(np.array(margins) > 0)
    figures = read_manifest(run).figures
    assert figures["heldout_accuracy"] == measured[1]["heldout_accuracy"]
    told = recipe.objective.told({"loss": 0.5, **measured[1]})
    assert f"heldout_accuracy {measured[1]['heldout_accuracy']:.3f}" in told and "heldout_reward_margin" in told


def test_an_infinite_tie_stays_at_the_reference(tiny_checkpoint, pairs, tmp_path):
    recipe = preferring(tiny_checkpoint, pairs, type="dpo", beta=0.0)
    run = dpo(replace(recipe, optim=replace(recipe.optim, weight_decay=0.0)), tmp_path / "run")
    before, after = (dict(load_model(path).module.named_parameters()) for path in (tiny_checkpoint, run))
    assert all(torch.equal(before[name], after[name]) for name in before)  # β = 0: no gradient at all


def test_reference_logprobs_are_computed_once_and_bound_to_the_model(tiny_checkpoint, pairs, tmp_path):
    recipe = preferring(tiny_checkpoint, pairs)
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    dpo(recipe, tmp_path / "run")
    stored = next((tmp_path / "run.data").glob("reference-*"))
    manifest = read_manifest(stored)
    assert {parent.role for parent in manifest.parents} == {"preferences", "reference"}
    made = (stored / "manifest.json").stat().st_mtime_ns
    dpo(replace(recipe, train=replace(recipe.train, steps=2)), tmp_path / "run")
    assert (stored / "manifest.json").stat().st_mtime_ns == made
    given = replace(recipe, data=replace(recipe.data, path=str(stored)))
    for field, value in (("seq_len", 128), ("precision", "fp64")):  # texts that were too long, and other rounding
        with pytest.raises(LineageError, match=f"computed in fp32 for texts of at most 64 tokens.*{value}"):
            dpo(replace(given, train=replace(given.train, **{field: value})), tmp_path / "other")
    changed = dpo(given, tmp_path / "same")
    other = replace(recipe, reference=str(changed), data=replace(recipe.data, path=str(stored)))
    with pytest.raises(LineageError, match=r"give --data\.path the \.jsonl file"):
        dpo(other, tmp_path / "other")


RANKING = {"prompt": "say 1", "responses": ["a", "b", "c"], "ranks": [3, 2, 1]}
LABEL = {"prompt": "say 1", "completion": "a", "label": True}
SOFT = {"prompt": "say 1", "chosen": "a", "rejected": "b", "probability": 0.7}


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        (
            RANKING,
            "dpo",
            "rankings of up to 3 answers, and this loss takes pairs: make pairs of them by luban data feedback",
        ),
        (LABEL, "simpo", r"2 single answers \(completion and label\)"),
        (SOFT, "kto", r"hold 2 soft labels \(`probability`\), which this loss doesn't read"),
    ],
)
def test_rows_that_a_loss_does_not_read_are_refused_before_the_reference_is(
    tiny_checkpoint, tmp_path, monkeypatch, row, method, message
):
    monkeypatch.setattr("luban.align.reference.reference_logprobs", None)  # calling it would raise a TypeError
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    with pytest.raises(DataError, match=message):
        dpo(preferring(tiny_checkpoint, tmp_path / "rows.jsonl", type=method), tmp_path / "run")
    assert not (tmp_path / "run.data").exists()


def test_a_run_of_another_reference_is_refused_before_log_probabilities_are_computed(
    tiny_checkpoint, pairs, tmp_path, monkeypatch
):
    recipe = preferring(tiny_checkpoint, pairs)
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    run = dpo(recipe, tmp_path / "run")
    adapted = dpo(replace(recipe, adapter=LoRA(rank=2)), tmp_path / "adapted")
    (tmp_path / "more.jsonl").write_text(pairs.read_text() + json.dumps(SOFT) + "\n")
    monkeypatch.setattr("luban.align.reference.reference_logprobs", None)
    for other, message in (
        (replace(recipe, reference=str(run)), "in which the reference differed"),
        (replace(recipe, data=replace(recipe.data, path=str(tmp_path / "more.jsonl"))), "the preferences differed"),
        (replace(recipe, train=replace(recipe.train, seq_len=48)), r"train\.precision or train\.seq_len differed"),
    ):
        with pytest.raises(ArtifactError, match=message):
            dpo(other, tmp_path / "run")
    with pytest.raises(ConfigError, match="is an adapter over another model: train over its merged weights"):
        dpo(replace(recipe, init=str(adapted), adapter=LoRA(rank=2)), tmp_path / "over")


def test_shards_of_another_tokenizer_are_refused_before_a_model_reads_them(
    tiny_checkpoint, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr("luban.align.reference.reference_logprobs", None)
    write_byte_tokenizer(tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ '' }}")
    other = as_preference_shards(pairs, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "cache", 0)
    for train in (dpo, reward):
        recipe = (preferring if train is dpo else rewarding)(tiny_checkpoint, other)
        with pytest.raises(LineageError, match="made with different tokenizers"):
            train(recipe, tmp_path / "run")


def test_held_out_pairs_that_are_all_too_long_leave_a_run_without_validation(tiny_checkpoint, pairs, tmp_path, capsys):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    heldout = heldout_prompts([row["prompt"] for row in rows], 0)
    for row in rows:
        if data_sha256(row["prompt"]) in heldout:
            row["chosen"] *= 60
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = preferring(tiny_checkpoint, pairs)
    run = dpo(replace(recipe, train=replace(recipe.train, steps=2)), tmp_path / "run")
    assert read_manifest(run).figures["step"] == 2
    assert "training without validation: every heldout text" in capsys.readouterr().err


def test_options_that_would_do_nothing_are_refused(tiny_checkpoint, pairs, tmp_path):
    for method in ("orpo", "simpo"):
        with pytest.raises(ConfigError, match=f"{method} compares with no reference: leave --reference out"):
            replace(preferring(tiny_checkpoint, pairs, type=method), reference="model")
    recipe = replace(rewarding(tiny_checkpoint, pairs), objective=Ranking(margin="small"))
    with pytest.raises(DataError, match=r"objective\.margin small reads grades, and no row of shards"):
        reward(recipe, tmp_path / "rm")


def test_another_reference_is_another_loss(tiny_checkpoint, pairs, tmp_path):
    recipe = preferring(tiny_checkpoint, pairs)
    moved = dpo(replace(recipe, train=replace(recipe.train, steps=8)), tmp_path / "moved")
    once = replace(recipe, train=replace(recipe.train, steps=1), reference=str(moved))
    loss = rows_of(dpo(once, tmp_path / "run"))[0]["loss"]
    assert (
        loss > np.log(2) + 0.01
    )  # the reference prefers the chosen answers already, so that the policy's margin is negative


def test_a_conversation_that_ends_with_a_question_has_no_score(tiny_checkpoint, pairs, tmp_path):
    recipe = rewarding(tiny_checkpoint, pairs)
    run = reward(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "rm")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    with pytest.raises(DataError, match=r"open\.jsonl:1: the answer doesn't end with a message of the assistant"):
        score_file(RewardModel.load(run), tmp_path / "open.jsonl", tmp_path / "scored.jsonl")


def test_recipes_without_meaning_are_refused(tiny_checkpoint, pairs, tmp_path):
    with pytest.raises(UsageError, match="give --init"):
        dpo(replace(preferring(tiny_checkpoint, pairs), init=""), tmp_path / "run")
    with pytest.raises(DataError, match="does not exist"):
        reward(rewarding(tiny_checkpoint, tmp_path / "none.jsonl"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"leave objective\.type out"):
        from_dict(DPORecipe, {**TINY, "objective": {"type": "causal"}})
    with pytest.raises(ConfigError, match="value"):
        reward(
            replace(rewarding(tiny_checkpoint, pairs), model=preferring(tiny_checkpoint, pairs).model), tmp_path / "r"
        )

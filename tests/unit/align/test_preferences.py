"""Files of preferences as shards, their batches, and log-probabilities that don't depend on the packing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import HostTensors
from training_data import cut, tensors

from luban.align.preferences import as_preference_shards, tokenise
from luban.core.errors import DataError
from luban.data.collate.preference import PreferenceRows
from luban.data.groups import Groups
from luban.data.shards import Shards
from luban.load.model import LoadedModel, load_model
from luban.models.build import build_model
from luban.models.head.rows import Value
from luban.objectives.preference import AnswerLossModule, Preference
from luban.objectives.preference_losses import DPO, KTO, ORPO
from luban.objectives.ranking import Ranking

WORDS = ["red", "blue", "green", "small", "large", "old", "new", "fast", "slow", "warm"]


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair(i: int, **more) -> dict:
    rng = np.random.default_rng(i)
    say = lambda n: " ".join(rng.choice(WORDS, n))  # noqa: E731
    return {"prompt": f"say {say(3)} {i}", "chosen": say(int(rng.integers(2, 6))), "rejected": say(1), **more}


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> LoadedModel:
    return load_model(tiny_checkpoint)


@pytest.fixture
def shards(model, tmp_path) -> Shards:
    file = write_rows(tmp_path / "pairs.jsonl", [pair(i, grade=i % 4) for i in range(12)])
    return Shards.open(as_preference_shards(file, model.tokenizer, tmp_path / "cache", 0))


def test_text_and_messages_give_the_same_tokens_and_only_the_answer_is_marked(model):
    tokenizer = model.tokenizer
    ids, prompt = tokenise("hello", "good day", tokenizer)
    same, _ = tokenise(
        [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "good day"}], tokenizer
    )
    assert ids == same
    assert tokenizer.decode(ids[prompt:], skip_special=False).strip() == "good day<|end|>"
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "b"},
    ]
    ids, prompt = tokenise(turns, "second", tokenizer)
    assert "first" in tokenizer.decode(ids[:prompt]) and "first" not in tokenizer.decode(ids[prompt:])


def test_heldout_prompts_are_not_trained_on(model, tmp_path):
    rows = [pair(i // 2) | {"rejected": f"{i}"} for i in range(80)]  # every prompt twice
    path = as_preference_shards(write_rows(tmp_path / "p.jsonl", rows), model.tokenizer, tmp_path / "cache", 0)
    prompts = {}
    for split in ("train", "heldout"):
        shards = Shards.open(path, split)
        prompts[split] = {
            bytes(shards.document(i)[shards.mask[shards.offsets[i] : shards.offsets[i + 1]] == 0])
            for i in range(shards.documents)
        }
    assert len(prompts["heldout"]) == 2 and not prompts["heldout"] & prompts["train"]


def test_rows_that_say_nothing_are_left_out_and_counted(model, tmp_path, capfd):
    rows = [pair(0), pair(1) | {"rejected": pair(1)["chosen"]}, pair(2) | {"chosen": " "}, pair(3)]
    path = as_preference_shards(write_rows(tmp_path / "p.jsonl", rows), model.tokenizer, tmp_path / "cache", 0)
    assert Groups.open(Shards.open(path)).count == 2
    said = capfd.readouterr().err
    assert "chosen equals rejected (such as line 2)" in said and "empty (such as line 3)" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, ":1: no 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "grade": 7}, "grade is 0 to 3"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 2}, "probability is a number"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "as many ranks"),
        ({"prompt": "a", "responses": "bc", "ranks": [1, 2]}, "need a list"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, float("nan")]}, "finite numbers"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "text or a list of messages, 5 given"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "message of the assistant"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}, "no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
    ],
)
def test_rows_without_meaning_are_refused_by_line(model, tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        as_preference_shards(write_rows(tmp_path / "p.jsonl", [row]), model.tokenizer, tmp_path / "cache", 0)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_a_pair_longer_than_the_context_is_left_out_whole(shards, capfd):
    sizes = np.diff(shards.offsets).reshape(-1, 2).max(1)
    limit = int(np.sort(sizes)[5])
    rows = PreferenceRows(shards, limit)
    assert rows.rows == int((sizes <= limit).sum()) < 12
    assert f"{12 - rows.rows} of 12 train groups" in capfd.readouterr().err
    batch = rows.gather(np.arange(rows.rows))
    whole = {bytes(shards.document(i)) for i in range(shards.documents)}
    for row in range(rows.rows):
        for k in range(2):
            text = batch.tokens[row][batch.documents[row] == k]
            assert bytes(text.astype(shards.data.dtype)) in whole
    with pytest.raises(DataError, match=r"raise train\.seq_len"):
        PreferenceRows(shards, 3)


def test_answer_logprobs_are_those_of_each_text_alone(model, shards):
    batch = tensors(PreferenceRows(shards, 64, mismatches=True).gather(np.arange(4)))
    found, lengths = AnswerLossModule(model.module).answer_logprobs(batch)
    for row in range(4):
        for k in range(2):
            document = 2 * row + k
            ids = torch.from_numpy(shards.document(document).astype(np.int64))
            answer = shards.mask[shards.offsets[document] : shards.offsets[document + 1]]
            logprobs = model.module(ids[None])[0].detach().double().log_softmax(-1)
            expected = sum(float(logprobs[t - 1, ids[t]]) for t in np.flatnonzero(answer))
            assert float(found[row, k].detach()) == pytest.approx(expected, rel=1e-4)
            assert int(lengths[row, k]) == int(answer.sum())
    other = shards.document(2)[shards.mask[shards.offsets[2] : shards.offsets[3]] != 0]  # of the next prompt
    assert int(lengths[0, 2]) == len(other)


@pytest.mark.parametrize("objective", [Preference(method=DPO(beta=0.5)), Preference(method=ORPO(), sft=0.3)])
def test_padding_and_accumulation_change_no_preference_loss(model, shards, objective):
    narrow, wide = (objective.examples(shards, seq_len=64, seed=0, packing="fit") for _ in range(2))
    wide.length += 64
    losses = []
    for rows in (narrow, wide):
        batch = tensors(rows.gather(np.array([0, 1, 2, 3])))
        batch["reference"] = torch.full_like(batch["reference"], -20.0)
        loss = objective.loss(model.module)
        losses += [loss(batch).sum, sum(loss(part).sum for part in cut(batch, 2))]
    padded = tensors(narrow.gather(np.array([0, 1, 2, 3, -1])))
    padded["reference"] = torch.where(padded["present"], -20.0, torch.nan)
    losses.append(objective.loss(model.module)(padded).sum)
    gradients = torch.autograd.grad(losses[-1], list(model.module.parameters()), allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    assert torch.stack(losses).detach().numpy() == pytest.approx(float(losses[0].detach()), rel=1e-4)


def test_padding_and_accumulation_change_no_ranking_loss(tiny_checkpoint, shards):
    module = build_model(replace(load_model(tiny_checkpoint).spec, head=Value()), seed=1)
    loss = Ranking(margin="large").loss(module)
    rows = PreferenceRows(shards, 64)
    batch = tensors(rows.gather(np.arange(4)))
    with HostTensors() as made:
        whole = loss(batch)
    assert made.count == 0
    parts = [loss(part) for part in cut(batch, 2)]
    assert float(whole.sum) == pytest.approx(sum(float(p.sum) for p in parts), rel=1e-4)
    alone = [float(module(torch.from_numpy(shards.document(i).astype(np.int64))[None])) for i in range(8)]
    assert loss.scores(batch).flatten().tolist() == pytest.approx(alone, rel=1e-3, abs=1e-4)


def test_kto_takes_unpaired_rows(model, tmp_path):
    rows = [{"prompt": f"say {i}", "completion": WORDS[i], "label": i % 2 == 0} for i in range(6)]
    path = as_preference_shards(write_rows(tmp_path / "p.jsonl", rows), model.tokenizer, tmp_path / "cache", 0)
    objective = Preference(method=KTO())
    batch = tensors(objective.examples(Shards.open(path), seq_len=64, seed=0, packing="fit").gather(np.arange(6)))
    batch["reference"], batch["mismatched_reference"] = torch.full((6, 1), -9.0), torch.full((6,), -9.0)
    found = objective.loss(model.module)(batch)
    found.sum.backward()
    assert torch.isfinite(found.sum)
    # what is imitated beside is the answers that are wanted, three of the six
    with_sft = replace(objective, sft=0.5).loss(model.module)
    logprobs, lengths = with_sft.answer_logprobs(batch)
    wanted = batch["ranks"][:, 0] == 1
    imitated = (logprobs[:, 0] / lengths[:, 0])[wanted]
    assert len(imitated) == 3
    assert float((with_sft(batch).sum - found.sum).detach()) == pytest.approx(
        -0.5 * float(imitated.sum().detach()), rel=1e-4
    )
    with pytest.raises(
        DataError, match=r"hold 6 single answers .* train on them by luban dpo … --objective\.method\.type kto"
    ):
        Preference().examples(Shards.open(path), seq_len=64, seed=0, packing="fit")

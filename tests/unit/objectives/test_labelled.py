"""Labelled texts: rows, loss against a plain computation, and the way from a language model to a classifier."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_data import WORDS, cut, tensors

import luban
from luban.cli.main import main
from luban.core.artifact import open_artifact
from luban.core.errors import ConfigError, DataError
from luban.data.shards import Shards
from luban.models.build import build_model
from luban.models.head.rows import Classes
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped
from luban.objectives.labelled import Labelled
from luban.tokenizer.tokenizer import load_tokenizer

LABELS = ("tame", "wild")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Shards of texts that are called wild where they name a river."""
    folder, draw = tmp_path_factory.mktemp("labelled"), random.Random(0)
    rows = []
    for i in range(400):
        words = [draw.choice([w for w in WORDS if w != "river"]) for _ in range(6)] + [str(i)]
        wild = draw.random() < 0.5
        if wild:
            words[draw.randrange(6)] = "river"
        rows.append(
            {"messages": [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": LABELS[wild]}]}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        ["corpus", "build", folder / "rows.jsonl", "--out", folder / "corpus", "--heldout", "0.2"],
        ["tokenizer", "train", folder / "corpus", "--out", folder / "tokenizer", "--vocab-size", "400"],
        ["data", "pack", folder / "corpus", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"],
    ):
        assert not main([str(part) for part in command])
    return folder / "shards"


def test_a_row_ends_before_the_answer_and_has_its_class(labelled):
    shards, objective = Shards.open(labelled), Labelled(labels=LABELS, weight=0.5)
    tokenizer = load_tokenizer(labelled / "tokenizer")
    batch = objective.examples(shards, seq_len=40, seed=0, packing="fit").gather(np.array([3, 7, -1]))
    for i, row in enumerate((3, 7)):
        real = batch.documents[i] >= 0
        text = tokenizer.decode(batch.tokens[i][real])
        assert LABELS[batch.labels[i]] == ("wild" if "river" in text else "tame")
        answer = tokenizer.decode(shards.document(row)[real.sum() :])
        assert answer.strip() == LABELS[batch.labels[i]]
        assert batch.loss_mask[i].sum() == 1 and batch.loss_mask[i, real.sum() - 1]
    assert not batch.loss_mask[2].any() and not batch.follows[2].any() and batch.target_count == 2


@pytest.mark.parametrize("pieces", [1, 3])
def test_loss_is_the_classes_mean_and_the_texts_mean_times_lambda_however_it_is_cut(labelled, pieces):
    shards, objective = Shards.open(labelled), Labelled(labels=LABELS, weight=0.5)
    batch = objective.examples(shards, seq_len=40, seed=0, packing="fit").gather(np.array([0, 5, 9, 11, 2, -1]))
    head = Classes(count=2, pooling="last", dense=False)
    model = build_model(
        uniform(
            vocab_size=shards.vocab_size,
            width=16,
            layers=1,
            context=40,
            tied_head=True,
            head=head,
            mixer=Grouped(heads=2),
        )
    ).double()
    loss = objective.loss(model)
    total = sum(loss(part).sum for part in cut(tensors(batch), pieces)) / batch.target_count
    classes, tokens_lost = [], []
    for row in (0, 5, 9, 11, 2):  # each alone, without padding
        document, mask = shards.document(row), shards.mask[shards.offsets[row] : shards.offsets[row + 1]]
        text = torch.from_numpy(document[: mask.argmax()].astype(np.int64))[None]
        answer = load_tokenizer(labelled / "tokenizer").decode(document[mask.argmax() :]).strip()
        hidden = model(text, output="hidden")[0]
        classes.append(F.cross_entropy(model(text), torch.tensor([LABELS.index(answer)])))
        tokens_lost.append(
            F.cross_entropy(hidden[:-1] @ model.decoder.embedding.tokens.weight.T, text[0, 1:], reduction="none")
        )
    want = torch.stack(classes).mean() + 0.5 * torch.cat(tokens_lost).mean()
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-6)


def test_a_language_model_becomes_a_classifier_by_a_recipe(labelled, tmp_path):
    (tmp_path / "lm.toml").write_text(f"""
data.path = "{labelled}"
model = {{ width = 32, layers = 1, context = 64, tied_head = true, layer = {{ mixer = {{ heads = 2, kv_heads = 2 }}, feedforward = {{ width = 48 }} }} }}
train = {{ steps = 30, batch_size = 16, seq_len = 32, device = "cpu" }}
""")
    (tmp_path / "classes.toml").write_text(f"""
init = "{tmp_path / "lm"}"
data.path = "{labelled}"
objective = {{ type = "labelled", labels = ["tame", "wild"], weight = 0.5 }}
optim = {{ lr = 3e-3 }}
train = {{ steps = 150, batch_size = 32, seq_len = 32, device = "cpu" }}
[model.head]
type = "classes"
count = 2
pooling = "last"
dense = false
""")
    assert not main(["pretrain", str(tmp_path / "lm.toml"), "--out", str(tmp_path / "lm")])
    assert not main(["pretrain", str(tmp_path / "classes.toml"), "--out", str(tmp_path / "classes")])
    assert open_artifact(tmp_path / "classes").parents
    model = luban.load_model(tmp_path / "classes")
    heldout = Shards.open(labelled, "heldout")
    batch = (
        Labelled(labels=LABELS)
        .examples(heldout, seq_len=32, seed=0, packing="fit")
        .gather(np.arange(heldout.documents))
    )
    chosen = model.module(torch.from_numpy(batch.tokens), torch.from_numpy(batch.documents >= 0)).argmax(-1)
    assert (chosen.numpy() == batch.labels).mean() >= 0.95


def test_what_does_not_fit_is_refused(labelled):
    shards = Shards.open(labelled)
    with pytest.raises(DataError, match=r"is answered '(tame|wild)', and objective.labels are 'good', 'bad'"):
        Labelled(labels=("good", "bad")).examples(shards, seq_len=20, seed=0, packing="fit")
    head = Classes(count=2, pooling="last")
    with pytest.raises(ConfigError, match="the head has 2 classes and the objective 3 labels"):
        Labelled(labels=("a", "b", "c")).require(head, causal=True, tied=True)
    with pytest.raises(ConfigError, match="has seen nothing of the text"):
        Labelled(labels=LABELS).require(Classes(count=2), causal=True, tied=True)
    with pytest.raises(ConfigError, match=r"set objective\.weight = 0"):
        Labelled(labels=LABELS, weight=0.5).require(Classes(count=2), causal=False, tied=True)
    with pytest.raises(ConfigError, match=r"set objective\.weight = 0"):
        Labelled(labels=LABELS, weight=0.5).require(head, causal=True, tied=False)

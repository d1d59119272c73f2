"""Text to text: rows beside what generation reads, loss against a plain computation, a run that learns to answer and its BLEU."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_data import WORDS, make_shards, tensors

import luban
from luban.cli.main import main
from luban.core.config import to_toml
from luban.core.errors import DataError
from luban.core.metrics.translation import corpus_score
from luban.data.shards import Shards
from luban.models.build import build_model
from luban.models.config import resolve_spec
from luban.objectives.text_to_text import TextToText
from luban.tokenizer.tokenizer import load_tokenizer

MODEL = {
    "width": 32,
    "layers": 1,
    "context": 32,
    "tied_head": True,
    "body": {"type": "encoder_decoder"},
    "position": {"type": "learned"},
    "layer": {"mixer": {"heads": 2, "kv_heads": 2}, "feedforward": {"width": 64}},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Shards of phrases and the same in capitals, word by word."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(1)
    said = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5))) for _ in range(400)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]}
        for text in said
    ]
    rows.append({"messages": [{"role": "user", "content": "the " * 60}, {"role": "assistant", "content": "THE"}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        ["corpus", "build", folder / "rows.jsonl", "--out", folder / "corpus", "--heldout", "0.1"],
        ["tokenizer", "train", folder / "corpus", "--out", folder / "tokenizer", "--vocab-size", "400"],
        ["data", "pack", folder / "corpus", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"],
    ):
        assert not main([str(part) for part in command])
    return folder


def test_a_row_is_the_text_as_generation_reads_it_and_the_answer_with_its_end(pairs, capsys):
    shards = Shards.open(pairs / "shards")
    rows = TextToText().examples(shards, seq_len=24, seed=0, packing="fit")
    longest = max(shards.documents - rows.rows, 0)
    assert longest == 1 and "1 train answers are left out" in capsys.readouterr().err
    batch, tokenizer = rows.gather(np.array([0, 5, -1])), load_tokenizer(pairs / "tokenizer")
    for i in (0, 1):
        source = batch.source[i][batch.source_mask[i]].tolist()
        text = tokenizer.decode([t for t in source if t not in (tokenizer.bos_id, tokenizer.eos_id)])
        assert source == tokenizer.encode(text, bos=True, eos=True)  # as a request's text is encoded for such a model
        target = batch.targets[i][batch.loss_mask[i]].tolist()
        assert target == tokenizer.encode(text.upper(), eos=True)
        assert batch.tokens[i][batch.loss_mask[i]].tolist() == [shards.pad_id, *target[:-1]]
    assert not batch.source_mask[2].any() and not batch.loss_mask[2].any()


def test_every_answer_of_a_conversation_is_a_row_behind_all_that_was_said_before(pairs):
    """Two documents taken as one conversation have two answers, of which the second has read the first."""
    shards, tokenizer = Shards.open(pairs / "shards"), load_tokenizer(pairs / "tokenizer")
    first, second = (
        TextToText().examples(shards, seq_len=99, seed=0, packing="fit").gather(np.array([i])) for i in (0, 1)
    )
    shards = replace(shards, offsets=np.delete(shards.offsets, 1))
    rows = TextToText().examples(shards, seq_len=99, seed=0, packing="fit")
    assert rows.rows == shards.documents + 1
    batch = rows.gather(np.array([0, 1]))
    said = [b.source[0][b.source_mask[0]].tolist() for b in (first, second)]
    answers = [b.targets[0][b.loss_mask[0]].tolist() for b in (first, second)]
    assert [batch.targets[i][batch.loss_mask[i]].tolist() for i in (0, 1)] == answers
    assert batch.source[0][batch.source_mask[0]].tolist() == said[0]
    known = {tokenizer.bos_id, tokenizer.eos_id}
    whole = [token for part in (said[0], answers[0], said[1]) for token in part if token not in known]
    assert [t for t in batch.source[1][batch.source_mask[1]].tolist() if t not in known] == whole


def test_loss_is_the_answers_cross_entropy_one_by_one(pairs):
    shards = Shards.open(pairs / "shards")
    batch = TextToText().examples(shards, seq_len=24, seed=0, packing="fit").gather(np.array([0, 3, 8, -1]))
    model = build_model(resolve_spec(MODEL, shards.vocab_size)).double()
    found = TextToText(smoothing=0.1).loss(model)(tensors(batch)).sum
    want = 0.0
    for i in range(3):
        source, real = batch.source[i][batch.source_mask[i]], batch.loss_mask[i]
        logits = model(torch.from_numpy(source)[None], torch.from_numpy(batch.tokens[i][real])[None])[0]
        want += F.cross_entropy(logits, torch.from_numpy(batch.targets[i][real]), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_a_run_learns_to_answer_and_its_bleu_is_far_above_the_copys(pairs, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    settings = {
        "data": {"path": str(pairs / "shards")},
        "objective": {"type": "text_to_text"},
        "optim": {"lr": 6e-3},
        "train": {"steps": 250, "batch_size": 32, "seq_len": 32, "device": "cpu"},
        "model": MODEL,
    }
    recipe.write_text(to_toml(settings))
    assert not main(["pretrain", str(recipe), "--out", str(tmp_path / "run")])
    heldout = [" ".join(random.choice(WORDS) for _ in range(5)) for _ in range(30)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{text.upper()}\n" for text in heldout))
    command = ["eval", tmp_path / "run", "translation", "--data", tmp_path / "pairs.tsv", "--out", tmp_path / "eval"]
    assert not main([str(word) for word in command])
    bleu = json.loads((tmp_path / "eval" / "results.json").read_text())["bleu"]
    copied, _, _ = corpus_score("bleu", heldout, [[text.upper()] for text in heldout])
    assert (
        bleu["value"] > 50 > 1 > copied
        and bleu["interval"][0] < bleu["value"] <= bleu["interval"][1]
        and bleu["n"] == 30
    )
    (lambada := tmp_path / "lambada.jsonl").write_text(json.dumps({"text": "the cat sat over the hill"}) + "\n")
    assert not main(["eval", str(tmp_path / "run"), "lambada", "--data", str(lambada), "--out", str(tmp_path / "no")])
    answer = luban.Engine(luban.load_model(tmp_path / "run")).generate("the cat", luban.Sampling(temperature=0))[0]
    assert answer.text.split()[0] == "THE"


def test_plain_text_and_rows_without_room_are_refused(pairs, tmp_path):
    with pytest.raises(DataError, match="hold plain text: text_to_text learns answers"):
        TextToText().examples(Shards.open(make_shards(tmp_path)), seq_len=24, seed=0, packing="fit")
    with pytest.raises(DataError, match=r"fits into train\.seq_len 2"):
        TextToText().examples(Shards.open(pairs / "shards"), seq_len=2, seed=0, packing="fit")

"""Shards: what goes in comes out, and what is damaged or wrong is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from packable import Doc, conversations, texts

from luban.core.artifact import open_artifact
from luban.core.errors import ArtifactError, DataError, LineageError
from luban.data import pack as pack_module
from luban.data.pack import pack
from luban.data.shards import Shards, token_dtype
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer


def test_texts_are_stored_between_bos_and_eos(text_shards, tokenizer):
    for split, documents in (("train", texts(150, seed=2)), ("heldout", texts(20, seed=3))):
        shards = Shards.open(text_shards, split)
        assert shards.documents == len(documents) and not shards.has_mask
        assert shards.bytes == sum(len(d.text.encode()) for d in documents)
        for i, document in enumerate(documents):
            assert shards.document(i).tolist() == [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]


def test_conversations_are_stored_as_rendered(chat_shards, tokenizer):
    shards = Shards.open(chat_shards)
    for i, document in enumerate(conversations(150, seed=2)):
        rendered = render(document.messages, tokenizer)
        assert shards.document(i).tolist() == rendered.token_ids
        mask = shards.mask[shards.offsets[i] : shards.offsets[i + 1]]
        assert (mask != 0).tolist() == rendered.loss_mask


def test_texts_and_conversations_together(tokenizer, tmp_path):
    mixed = [d for pair in zip(texts(5, seed=4), conversations(5, seed=4), strict=True) for d in pair]
    figures = pack({"train": mixed, "heldout": []}, tokenizer.path, tmp_path / "s")
    shards = Shards.open(tmp_path / "s")
    assert figures["train"]["conversations"] == 5 and shards.documents == 10
    assert all(shards.mask[shards.offsets[i] + 1 : shards.offsets[i + 1]].all() for i in range(0, 10, 2))
    assert figures["train"]["trained"] == shards.mask.sum()
    with pytest.raises(DataError, match="no heldout documents"):
        Shards.open(tmp_path / "s", "heldout")


def test_rounds_change_nothing(tokenizer, tmp_path, monkeypatch):
    documents = [*texts(40, seed=5), *conversations(40, seed=5)]
    pack({"train": documents}, tokenizer.path, tmp_path / "a")
    monkeypatch.setattr(pack_module, "ROUND_CHARACTERS", 50)
    pack({"train": iter(documents)}, tokenizer.path, tmp_path / "b")
    assert open_artifact(tmp_path / "a").content_hash == open_artifact(tmp_path / "b").content_hash


def test_the_tokenizer_travels_inside_and_is_the_parent(text_shards, tokenizer):
    inside = load_tokenizer(text_shards / "tokenizer")
    shards = Shards.open(text_shards)
    assert inside.content_hash == tokenizer.content_hash == shards.tokenizer_hash
    assert [p.role for p in open_artifact(text_shards).parents] == ["tokenizer"]
    shards.require_tokenizer(tokenizer.content_hash, "model runs/a")
    with pytest.raises(LineageError, match=r"shards .* and model runs/a were made with different tokenizers"):
        shards.require_tokenizer("0" * 64, "model runs/a")


def test_a_plain_hugging_face_tokenizer_packs_too(tokenizer, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(tokenizer.path / "tokenizer.json", folder)
    with pytest.raises(DataError, match="no end-of-text token"):
        pack({"train": texts(3, seed=6)}, folder, tmp_path / "s")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    (folder / "weights.bin").write_bytes(b"large")
    documents = [Doc("a", "alpha beta")]
    pack({"train": documents}, folder, tmp_path / "s")
    shards = Shards.open(tmp_path / "s")
    assert shards.document(0).tolist() == [*tokenizer.encode("alpha beta"), 1]
    assert sorted(p.name for p in (tmp_path / "s" / "tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_tokenizer(tmp_path / "s" / "tokenizer").content_hash == shards.tokenizer_hash


def test_an_all_zero_mask_is_refused(tokenizer, tmp_path):
    unanswered = [Doc(str(i), "q", [{"role": "user", "content": "q"}]) for i in range(3)]
    with pytest.raises(DataError, match="loss mask would be all zeros"):
        pack({"train": unanswered}, tokenizer.path, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    figures = pack({"train": [*unanswered, *conversations(2, seed=1)]}, tokenizer.path, tmp_path / "s")
    assert (figures["train"]["dropped_conversations"], figures["train"]["documents"]) == (3, 2)


def test_a_conversation_whose_answers_are_not_certain_is_named(tokenizer, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(tokenizer.path / "tokenizer.json", folder)
    template = "{% for m in messages %}{{ m['content'] + '|' + m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>", "chat_template": template}))
    with pytest.raises(DataError, match=r"document 1-0: turn 2 .*repeats its words"):
        pack({"train": conversations(2, seed=1)}, folder, tmp_path / "s")
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.incomplete").exists()


def test_an_empty_corpus_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no document"):
        pack({"train": []}, tokenizer.path, tmp_path / "s")


@pytest.mark.parametrize(
    "file", ["train-00000.tokens", "train-00000.offsets", "train-00000.mask", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "edit", "remove"])
def test_damaged_shards_are_refused(chat_shards, tmp_path, file, damage):
    shutil.copytree(chat_shards, tmp_path / "s")
    path = tmp_path / "s" / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(ArtifactError, match=file):
        Shards.open(tmp_path / "s", verify=damage == "edit")


def test_the_smallest_type_that_holds_every_id():
    assert [token_dtype(v).str for v in (1 << 16, (1 << 16) + 1)] == ["<u2", "<u4"]
    assert np.array([65535], dtype=token_dtype(1 << 16))[0] == 65535

"""BERT's vocab.txt against a plain implementation of its paper's code, Mistral's tekken.json against tiktoken."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest
from vocabularies import CASED, CONTROL, PIECES, tekken

from luban.core.errors import DataError
from luban.tokenizer.importing.artifact import import_tokenizer


def plain(text: str, vocabulary: dict[str, int], lower: bool) -> list[int]:
    """BERT's BasicTokenizer and WordpieceTokenizer, after google-research/bert's description, character by character."""
    kept = []
    for c in text:
        if c in "\x00\ufffd" or (unicodedata.category(c).startswith("C") and c not in "\t\n\r"):
            continue
        sign = 0x4E00 <= ord(c) <= 0x9FFF or 0x3400 <= ord(c) <= 0x4DBF or 0xF900 <= ord(c) <= 0xFAFF
        kept.append(f" {c} " if sign else " " if c.isspace() else c)
    if lower:
        kept = [c for c in unicodedata.normalize("NFD", "".join(kept)) if unicodedata.category(c) != "Mn"]
        kept = list("".join(kept).lower())
    words, ids = [], []
    for word in "".join(kept).split():
        words.append("")
        for c in word:
            ascii_sign = c.isascii() and c.isprintable() and not c.isalnum()
            if ascii_sign or unicodedata.category(c).startswith("P"):
                words += [c, ""]
            else:
                words[-1] += c
    for word in filter(None, words):
        found, start = [], 0
        while start < len(word):
            ends = (
                end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in vocabulary
            )
            end = next(ends, None)
            if end is None or len(word) > 100:
                found = [vocabulary["[UNK]"]]
                break
            found.append(vocabulary[("##" if start else "") + word[start:end]])
            start = end
        ids += found
    return ids


@pytest.mark.parametrize(
    "cased, config", [(False, None), (True, None), (True, {"do_lower_case": True}), (False, {"do_lower_case": False})]
)
def test_bert_vocabularies(cased, config, tmp_path):
    pieces = [*CONTROL, *PIECES, *(CASED if cased else [])]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = import_tokenizer(tmp_path / "vocab.txt", tmp_path / "t")
    lower = not cased if config is None else config["do_lower_case"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert (ours.vocab_size, ours.pad_id, ours.special) == (
        len(pieces),
        0,
        {token: i for i, token in enumerate(CONTROL)},
    )
    rng = random.Random()
    letters = [
        *"Hello World tokenization CAFÉ café naïve 你好世界 uniformer",
        "\u0301",
        "\t",
        "\n",
        "\u200d",
        "\x00",
        "[CLS]",
        "[MASK]",
        "##iz",
        "$",
        "—",
        "x" * 101,
    ]
    for _ in range(500):
        text = "".join(rng.choice([*letters, "Hello ", "token"]) for _ in range(rng.randint(0, 20)))
        assert ours.encode(text) == plain(text, vocabulary, lower), text
        assert not set(ours.encode(text)) & {0, 2, 3, 4}  # text never yields a special token but the unknown one
    assert ours.decode(ours.encode("hello tokenizer, world!")) == "hello tokenizer, world!"
    assert import_tokenizer(tmp_path, tmp_path / "again").content_hash == ours.content_hash  # by the directory


@pytest.mark.parametrize("special", [None, ["<unk>", "<s>", "</s>", "[INST]", "<think>"]])
def test_tekken_vocabularies(special, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    data, ranks = tekken(600, special)
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    ours = import_tokenizer(tmp_path / "tekken.json", tmp_path / "t")
    theirs = tiktoken.Encoding("x", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (610, 1, 2, 11 if special is None else None)
    assert ours.special["[INST]"] == 3 and ours.special["<SPECIAL_29>"] == 29 and len(ours.special) == 30
    assert ours.special.get("<think>") == (None if special is None else 4)
    rng = random.Random()
    for _ in range(300):
        text = "".join(rng.choice([*"theo nair./\n1é漢🐉", "<s>", "[INST]"]) for _ in range(30))
        ids = ours.encode(text)
        assert ids == [i + 30 for i in theirs.encode_ordinary(text)] and ours.decode(ids) == text
    assert ours.encode_marked("<s>[INST]the")[0] == [1, 3, *ours.encode("the")]
    assert import_tokenizer(tmp_path, tmp_path / "again").content_hash == ours.content_hash


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("vocab.txt", "hello\nworld\n", r"a line \[UNK\]"),
        ("tekken.json", "{}", "not a tekken vocabulary: it has no field 'config'"),
        ("tekken.json", json.dumps(tekken(300, ["<s>", "<s>"])[0]), "different special tokens"),
        (
            "tekken.json",
            json.dumps({**tekken(300, None)[0], "vocab": tekken(300, None)[0]["vocab"][1:]}),
            "1 bytes without a rank",
        ),
    ],
)
def test_what_is_no_such_vocabulary_is_refused(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        import_tokenizer(tmp_path / name, tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == [name]

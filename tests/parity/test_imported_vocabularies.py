"""Imported vocabularies give the ids of the libraries that made them, on English, Chinese, code, emoji and noise."""

from __future__ import annotations

import base64
import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest

from luban.core.errors import DataError, UnsupportedError
from luban.tokenizer.importing.artifact import import_tokenizer
from luban.tokenizer.importing.tiktoken import _R50K, _SPELLING, CL100K
from luban.tokenizer.train import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def corpus() -> list[str]:
    code = [
        line for name in ("argparse.py", "os.py", "textwrap.py") for line in (STDLIB / name).read_text().splitlines()
    ]
    return [
        *code,
        *["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"] * 20,
        *["Ünïcödé naïve café — “quotes” 😀👍🏽"] * 20,
    ]


def probes(seed: int) -> list[str]:
    """Lines as they are, spliced lines, runs of spaces, and random characters from everywhere."""
    rng = random.Random(seed)
    lines = corpus()
    planes = [(32, 127), (0xA0, 0x250), (0x4E00, 0x9FA5), (0x1F300, 0x1F650), (0x0600, 0x06FF), (0x2000, 0x2070)]
    noise = ["".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(1, 30))) for _ in range(200)]
    spliced = ["".join(rng.choices(lines, k=3))[rng.randint(0, 9) :] for _ in range(200)]
    spaces = [
        " " * rng.randint(0, 5) + "word" + " " * rng.randint(0, 5) + "\t\n" * rng.randint(0, 2) + "x1234567"
        for _ in range(50)
    ]
    return ["", " ", "\n", "a", "don't DON'T we'll", *rng.choices(lines, k=200), *noise, *spliced, *spaces]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Token bytes → rank, of a vocabulary learned here."""
    made = train_tokenizer(corpus(), tmp_path_factory.mktemp("tok") / "t", vocab_size=1500)
    spelled = {character: byte for byte, character in _SPELLING.items()}
    learned = [bytes(spelled[c] for c in made.token(i)) for i in range(16, made.vocab_size)]
    return {token: i for i, token in enumerate(learned)}


def test_tiktoken_ranks(ranks, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    file = tmp_path / "x.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    ours = import_tokenizer(file, tmp_path / "t")
    theirs = tiktoken.Encoding("x", pat_str=CL100K, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    for text in probes(1):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == len(ranks) == ours.vocab_size - 1
    assert ours.eos_id not in ours.encode("<|endoftext|>")


def test_gpt2_files(ranks, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    from luban.tokenizer.importing.tiktoken import split

    spell = {token: "".join(_SPELLING[b] for b in token) for token in ranks}
    vocabulary = {**{spell[t]: r for t, r in ranks.items()}, "<|endoftext|>": len(ranks)}
    merges = [split(token, ranks) for token in ranks if len(token) > 1]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(DataError, match=r"merges\.txt or vocab\.bpe"):
        import_tokenizer(tmp_path / "vocab.json", tmp_path / "t")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{spell[a]} {spell[b]}\n" for a, b in merges))
    ours = import_tokenizer(tmp_path / "vocab.json", tmp_path / "t")
    theirs = tiktoken.Encoding("x", pat_str=_R50K, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    for text in probes(2):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


SENTENCEPIECE = {
    "llama": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "bpe": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "no-prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
}


@pytest.mark.parametrize("options", SENTENCEPIECE.values(), ids=list(SENTENCEPIECE))
def test_sentencepiece_models(options, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=1200,
        minloglevel=2,
        character_coverage=0.999,
        num_threads=1,
        pad_id=3,
        **options,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ours = import_tokenizer(tmp_path / "m.model", tmp_path / "t")
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), 3)
    for text in probes(3):
        if options.get("normalization_rule_name") != "identity":  # see luban.tokenizer.importing.sentencepiece
            text = "".join(c for c in text if not unicodedata.category(c).startswith("M"))
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        if theirs.unk_id() not in expected:
            assert ours.decode(expected) == theirs.decode(expected)


def gguf_file(path, tokens, kind, *, types=None, scores=None, merges=None, pre=None, **ids):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [1] * len(tokens))
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in ids.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_of_sentencepiece_pieces(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(tmp_path / "m"),
        vocab_size=1200,
        minloglevel=2,
        num_threads=1,
        **SENTENCEPIECE["llama"],
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    every = range(theirs.get_piece_size())
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in every]
    file = gguf_file(
        tmp_path / "m.gguf",
        [theirs.id_to_piece(i) for i in every],
        "llama",
        types=types,
        scores=[theirs.get_score(i) for i in every],
        bos_token_id=1,
        eos_token_id=2,
        chat_template="{{ messages[0].content }}",
    )
    ours = import_tokenizer(file, tmp_path / "t")
    assert (ours.bos_id, ours.eos_id, ours.chat_template) == (1, 2, "{{ messages[0].content }}")
    for text in probes(5):
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize("pre, pattern", [("gpt-2", _R50K), ("llama-bpe", CL100K)])
def test_gguf_of_merges(ranks, tmp_path, pre, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    from luban.tokenizer.importing.tiktoken import split

    spell = {token: "".join(_SPELLING[b] for b in token) for token in ranks}
    merges = [" ".join(spell[part] for part in split(token, ranks)) for token in ranks if len(token) > 1]
    tokens = [*(spell[t] for t in ranks), "<|end|>"]
    file = gguf_file(
        tmp_path / "m.gguf",
        tokens,
        "gpt2",
        types=[*([1] * len(ranks)), 3],
        merges=merges,
        pre=pre,
        eos_token_id=len(ranks),
    )
    ours = import_tokenizer(file, tmp_path / "t")
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": len(ranks)})
    assert ours.eos_id == len(ranks)
    for text in probes(6):
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ours.encode(text)) == text


def test_gguf_that_cannot_be_imported_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="vocabulary 'bert'"):
        import_tokenizer(gguf_file(tmp_path / "a.gguf", ["a", "b"], "bert"), tmp_path / "t")
    with pytest.raises(UnsupportedError, match="word pattern 'odd'"):
        import_tokenizer(gguf_file(tmp_path / "b.gguf", ["a", "b"], "gpt2", merges=[], pre="odd"), tmp_path / "t")
    (tmp_path / "c.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(DataError, match="not a GGUF file"):
        import_tokenizer(tmp_path / "c.gguf", tmp_path / "t")


def test_tokenizer_json_with_its_settings(tmp_path):
    first = train_tokenizer(corpus(), tmp_path / "a", vocab_size=400)
    for path in (tmp_path / "a", tmp_path / "a" / "tokenizer.json"):
        again = import_tokenizer(path, tmp_path / f"b{path.suffix}")
        assert again.chat_template == first.chat_template and again.stop_ids == first.stop_ids
        assert all(again.encode(text) == first.encode(text) for text in probes(4))


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("x.tiktoken", b"not base64!\n", "not a tiktoken rank file"),
        ("x.tiktoken", b"YQ== 0\n", "255 of the 256 bytes"),
        ("x.model", b"\x0a\xff\xff", "not a SentencePiece model"),
        ("x.model", b"", "no pieces"),
        ("x.json", b"{}", r"not a tokenizer\.json"),
        ("x.bin", b"abc", "no known vocabulary"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        import_tokenizer(tmp_path / name, tmp_path / "t")
    with pytest.raises(DataError, match="does not exist"):
        import_tokenizer(tmp_path / "none.model", tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == [name]

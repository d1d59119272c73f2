"""Vocabularies: lossless on any text, special tokens out of reach of text, the same every time."""

from __future__ import annotations

import collections
import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from luban.core.errors import ArtifactError, ConfigError, DataError
from luban.tokenizer import train as train_module
from luban.tokenizer.algorithms import ALGORITHMS
from luban.tokenizer.algorithms.wordpiece import INSIDE
from luban.tokenizer.special import SPECIAL_TOKENS
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tokenizer.train import train_tokenizer

EVIL = st.lists(st.one_of(st.text(), st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "##", "<0x41>", "Ġ", "\u203f"])))
relaxed = settings(max_examples=150)


@relaxed
@given(parts=EVIL)
def test_any_text_comes_back_and_never_yields_a_special_token(trained, parts):
    text = "".join(parts)
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not set(ids) & set(trained.special.values())
    assert all(0 <= i < trained.vocab_size for i in ids)


@relaxed
@given(texts=st.lists(st.text(), max_size=8))
def test_a_batch_is_its_texts(trained, texts):
    assert trained.encode_batch(texts) == [trained.encode(text) for text in texts]


def test_long_runs_stay_lossless(trained):
    text = "é" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 3000
    assert trained.decode(trained.encode(text)) == text


def test_special_tokens_come_first_in_their_order(trained):
    assert [trained.token(i) for i in range(16)] == list(SPECIAL_TOKENS)
    assert trained.special == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (trained.bos_id, trained.eos_id, trained.pad_id, trained.stop_ids) == (0, 1, 2, (1, 6))


def test_bos_and_eos_once_where_asked(bpe):
    assert bpe.encode("x", bos=True, eos=True) == [0, *bpe.encode("x"), 1]
    assert bpe.decode([0, *bpe.encode("x"), 1]) == "x"
    assert bpe.decode([0], skip_special=False) == "<|bos|>"


def test_lone_surrogates_are_replaced(bpe):
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_training_twice_gives_the_same_artifact(algorithm, texts, tmp_path):
    size = {"char": 290, "wordpiece": 560, "unigram": 280}.get(algorithm, 300)
    made = [train_tokenizer(iter(texts), tmp_path / str(i), algorithm=algorithm, vocab_size=size) for i in range(2)]
    assert made[0].content_hash == made[1].content_hash
    assert made[0].vocab_size == size


def test_bpe_merges_are_those_of_a_brute_force_trainer(tmp_path):
    text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    tokenizer = train_tokenizer([text], tmp_path / "t", vocab_size=16 + 256 + 12)
    merges = json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["merges"]
    assert [tuple(merge) for merge in merges] == brute_force_merges(text, 12, tokenizer)


def brute_force_merges(text, amount, tokenizer):
    """Sennrich et al. 2016, algorithm 1; ties go to the pair with the smaller ids, as in the library."""
    ids = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    words = collections.Counter(tuple(word) for word in text.replace(" ", " Ġ").split(" "))
    merges = []
    for _ in range(amount):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        merged = collections.Counter()
        for word, count in words.items():
            out, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    out.append(word[i] + word[i + 1])
                    i += 2
                else:
                    out.append(word[i])
                    i += 1
            merged[tuple(out)] += count
        words = merged
    return merges


def test_wordpieces_are_those_of_a_brute_force_trainer(tmp_path):
    """The library learns WordPiece's vocabulary by merging the most frequent pair, pieces inside words kept apart."""
    text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    tokenizer = train_tokenizer([text], tmp_path / "t", algorithm="wordpiece", vocab_size=16 + 512 + 12)
    pieces = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    assert pieces[528:] == brute_force_pieces(text, 12, pieces[:528])


def brute_force_pieces(text, amount, fixed):
    """Pairs by count, ties by the smaller ids; what is merged loses its second part's mark."""
    ids = {piece: i for i, piece in enumerate(fixed)}
    words = collections.Counter(
        (word[0], *(INSIDE + byte for byte in word[1:])) for word in text.replace(" ", " Ġ").split(" ")
    )
    learned = []
    while len(learned) < amount:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        a, b = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        piece = a + b.removeprefix(INSIDE)
        if piece not in ids:
            ids[piece] = len(ids)
            learned.append(piece)
        merged = collections.Counter()
        for word, count in words.items():
            out = list(word)
            i = 0
            while i < len(out) - 1:
                if (out[i], out[i + 1]) == (a, b):
                    out[i : i + 2] = [piece]
                i += 1
            merged[tuple(out)] += count
        words = merged
    return learned


@pytest.mark.parametrize("algorithm, smallest", [("bpe", 272), ("unigram", 272), ("char", 272), ("wordpiece", 528)])
def test_a_vocabulary_too_small_for_its_bytes_is_refused(algorithm, smallest, tmp_path):
    with pytest.raises(ConfigError, match=str(smallest)):
        train_tokenizer(["text"], tmp_path / "t", algorithm=algorithm, vocab_size=smallest - 1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], tmp_path / "t")
    with pytest.raises(ConfigError, match="did you mean 'bpe'"):
        train_tokenizer(["x"], tmp_path / "t", algorithm="bpee")
    assert list(tmp_path.iterdir()) == []


def test_no_count_can_overflow(texts, tmp_path, monkeypatch, capsys):
    """The library counts pairs in 32 signed bits: no more bytes are read than that holds."""
    assert train_module.MOST_BYTES < 2**31
    sizes = [len(text.encode()) for text in texts]
    monkeypatch.setattr(train_module, "MOST_BYTES", sum(sizes[:100]))
    cut = train_tokenizer(iter(texts), tmp_path / "cut", vocab_size=300)
    assert f"first {100} texts" in capsys.readouterr().err
    assert cut.encode_batch(texts) == train_tokenizer(texts[:100], tmp_path / "b", vocab_size=300).encode_batch(texts)
    monkeypatch.setattr(train_module, "MOST_BYTES", sum(sizes[:100]) - 1)
    train_tokenizer(iter(texts), tmp_path / "c", vocab_size=300)
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["figures"]["documents"] == 99


WORDS = ["[PAD]", "[UNK]", "<s>", "the", "[", "PAD", "]", "a", "##b", "b"]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"),
        models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"),
        models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], 1),
    ],
    ids=["words", "pieces", "unigram"],
)
def test_a_word_that_spells_a_special_token_is_a_word_in_every_kind_of_vocabulary(model, tmp_path):
    """A `tokenizer.json` of others, whose model would find the special token as a word of its vocabulary."""
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["[PAD]", "<s>"])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    found = load_tokenizer(tmp_path)
    special = {found.special["[PAD]"], found.special["<s>"]}
    assert special == {0, 2} and [found.token(i) for i in range(found.vocab_size)] == WORDS
    for text in ("[PAD]", "the [PAD] a", "<s> the", "[PAD] <s>"):
        assert not special & set(found.encode(text)), text
    assert found.encode("the a") == [3, 7] and found.encode_marked("<s> the")[0] == [2, 3]
    assert json.loads(found.to_json()) == json.loads(library.to_str(pretty=True))
    if isinstance(model, models.WordPiece):
        assert found.encode("ab b") == [7, 8, 9] and found.encode("[PAD]") == [1]


def test_loading_again_gives_the_same(bpe):
    again = load_tokenizer(bpe.path)
    assert again.content_hash == bpe.content_hash
    assert again.encode("def f(x): return x") == bpe.encode("def f(x): return x")


def test_an_edited_tokenizer_is_refused(texts, tmp_path):
    train_tokenizer(texts, tmp_path / "t", vocab_size=300)
    with open(tmp_path / "t" / "chat_template.jinja", "a") as file:
        file.write(" ")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja"):
        load_tokenizer(tmp_path / "t")


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is needed"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_decoding_an_impossible_id_is_refused(bpe):
    with pytest.raises(DataError, match="token ids"):
        bpe.decode([-1])

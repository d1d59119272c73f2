"""SentencePiece vocabularies of every option against sentencepiece itself, on strings that spell pieces and odd spaces."""

from __future__ import annotations

import random

import pytest
import tokenizers
from vocabularies import OPTIONS, sentencepiece_model

from luban.core.errors import UnsupportedError
from luban.tokenizer.importing.artifact import import_tokenizer
from luban.tokenizer.importing.sentencepiece import NORMAL, UNUSED, build, parse
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

spm = pytest.importorskip("sentencepiece")
LETTERS = (
    "aZé 's'S\n\r\t  .,!?/1½ªʰ你ーह्ि́😀\u200d\u2028\u00a0\u3000<s>0x41_-ß▁ﬁ①Ａ가한क़ं´\u0323ﷺ\ufffd\u1100\u1161\u11a8"
    "αβгд漢字ขี"
)
SPELLED = [
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "<0xE6>",
    "<pad>",
    "<sep>",
    "<sep><sep>",
    "①②",
    "  ",
    "a \n b",
    "x \n",
    "▁▁",
    "the ",
    " and",
    "e\u0301",
    "漢🐉",
    "[CLS]",
]


@pytest.fixture(scope="module", params=OPTIONS.items(), ids=list(OPTIONS))
def pair(request, tmp_path_factory):
    """(ours, sentencepiece's processor, the model file) of one set of options."""
    name, options = request.param
    folder = tmp_path_factory.mktemp(name)
    file = sentencepiece_model(folder, options)
    return import_tokenizer(file, folder / "t"), spm.SentencePieceProcessor(model_file=str(file)), file


def strings(rng: random.Random, count: int = 400) -> list[str]:
    """Random characters, and random characters with pieces spelled among them."""
    drawn = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 25))) for _ in range(count)]
    return [
        "",
        " ",
        "   three",
        "12345678901",
        *SPELLED,
        *drawn,
        *("".join(rng.choice([*SPELLED, *LETTERS]) for _ in range(rng.randint(1, 8))) for _ in range(count)),
    ]


def test_ids_and_texts_are_those_of_sentencepiece(pair):
    ours, theirs, _ = pair
    assert ours.vocab_size == theirs.get_piece_size()
    rng = random.Random()
    for text in strings(rng):
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected), text
        assert not set(expected) & set(ours.special.values())


def test_any_ids_are_joined_as_sentencepiece_joins_them(pair):
    ours, theirs, _ = pair
    rng = random.Random()
    bytes_ = [i for i in range(theirs.get_piece_size()) if theirs.is_byte(i)]
    for _ in range(400):
        ids = [
            rng.choice(bytes_) if bytes_ and rng.random() < 0.5 else rng.randrange(theirs.get_piece_size())
            for _ in range(rng.randint(0, 12))
        ]
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_names_ids_and_roles_are_those_of_the_model(pair):
    ours, theirs, _ = pair
    assert [ours.token(i) for i in range(ours.vocab_size)] == theirs.id_to_piece(list(range(ours.vocab_size)))
    control = {theirs.id_to_piece(i): i for i in range(ours.vocab_size) if theirs.is_control(i)}
    assert ours.special == control
    pad = theirs.pad_id()
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_id(), theirs.eos_id(), None if pad < 0 else pad)


def test_a_saved_vocabulary_is_the_same_again(pair, tmp_path):
    ours, _, _ = pair
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.to_json() == ours.to_json()
    for text in strings(random.Random(), 50):
        assert again.encode(text) == ours.encode(text)
        assert ours.encode_batch([text, text]) == [ours.encode(text)] * 2


def test_ranges_are_places_in_the_text_as_it_was_given(pair):
    """The ranges of all tokens but the added space cover every character that gives a token, in order."""
    ours, _, _ = pair
    for text in strings(random.Random(), 100):
        ids, ranges = ours.encode_plain(text)
        assert ids == ours.encode(text)
        assert all(0 <= a <= b <= len(text) for a, b in ranges)
        assert [a for a, _ in ranges] == sorted(a for a, _ in ranges)
        for i, (a, b) in zip(ids, ranges, strict=True):
            plain = ours.decode([i]).strip()
            if plain.isascii() and plain.isalnum() and plain in text:
                assert plain.lower() in text[a:b].lower() or not text[a:b].isascii(), (text, plain, (a, b))


def test_special_tokens_are_recognised_between_rules(pair):
    ours, _, _ = pair
    for special, token in ours.special.items():
        text = f"ﬁrst{special}क़ि x"
        ids, ranges = ours.encode_marked(text)
        place = ids.index(token)
        assert text[slice(*ranges[place])] == special
        assert [i for i in ids if i in ours.special.values()] == [token]


DIRECTORIES = ["unigram", "unigram-bytes", "unigram-identity", "unigram-folded", "unigram-names"]


@pytest.mark.parametrize("pair", [(name, OPTIONS[name]) for name in DIRECTORIES], ids=DIRECTORIES, indirect=True)
def test_a_directory_of_hugging_face_is_read_the_same_way(pair, tmp_path):
    """T5's `tokenizer.json`: Unigram with a Metaspace pre-tokenizer, and special tokens in the vocabulary."""
    _, theirs, file = pair
    model = parse(file)
    library = build(model)[0]
    steps = [tokenizers.normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    spaces = tokenizers.Regex(" {2,}")
    library.normalizer = tokenizers.normalizers.Sequence(
        [*steps, tokenizers.normalizers.Strip(left=False, right=True), tokenizers.normalizers.Replace(spaces, "▁")]
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    ours = load_tokenizer(tmp_path)
    for text in ["</s>", "a</s>b", "<0x41>", "<unk>x", "[CLS]", "क़ि ﬁ\u0301", "the [EOS] x"]:
        assert ours.encode(text) == theirs.encode(text), text


def test_what_cannot_be_imported_exactly_is_refused(pair, tmp_path):
    _, _, file = pair
    cases = {
        "escape_whitespaces": {"escape_whitespaces": False},
        "denormalizer": {"denormalised": True},
        "word or character": {"kind": 3},
    }
    for words, change in cases.items():
        model = parse(file)
        vars(model).update(change)
        with pytest.raises(UnsupportedError, match=words):
            build(model)
    model = parse(file)
    long = max(range(len(model.pieces)), key=lambda i: len(model.pieces[i][0]) * (model.pieces[i][2] == NORMAL))
    model.pieces[long] = (*model.pieces[long][:2], UNUSED)
    with pytest.raises(UnsupportedError, match="marked unused"):
        build(model)
    model = parse(file)
    model.pieces[-1] = ("ﬁ x", 0.0, 4)
    with pytest.raises(UnsupportedError, match="user-defined symbol 'ﬁ x'"):
        build(model)


def test_unknown_characters_alone_are_unknown(pair):
    ours, theirs, _ = pair
    assert isinstance(ours, Tokenizer)
    for text in ("\U0010f03c", "\U0010fe41", "豈龜", "龘</s>龘"):  # what the exchange of characters uses, too
        if theirs.unk_id() in (expected := theirs.encode(text)):
            assert ours.encode(text) == expected

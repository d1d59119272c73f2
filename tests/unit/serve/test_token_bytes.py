"""Log-probabilities over HTTP: tokens' bytes, spaces, offsets and alternatives."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from http_requests import ASK

from luban.generate.session import TokenLogprob
from luban.serve.api.answer import Shape
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luban.tokenizer.train import train_tokenizer

TEXTS = ["the row 漢🐉 é", " lead", "a\n\nb  c", "naïve\tx", "𝒳 <0x41> </s>"]


def byte_fallback() -> Tokenizer:
    """A vocabulary with SentencePiece's spaces and byte tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    from luban.tokenizer.settings import Settings

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", "row", "A", "a", "b", "e", "h", "l", "t", "x"]
    model = Library(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=False,
        )
    )
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(model, Settings())


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {
        name: train_tokenizer(TEXTS * 3, folder / name, algorithm=name, vocab_size=size)
        for name, size in (("bpe", 400), ("charbpe", 400))
    }
    return {**made, "byte fallback": byte_fallback()}


@pytest.mark.parametrize("name", ["bpe", "charbpe", "byte fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_bytes_are_the_texts(vocabularies, name, text):
    tokenizer = vocabularies[name]
    ids = tokenizer.encode(text)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined.removeprefix(" ") == text.removeprefix(" ")
    assert tokenizer.decode(ids).removeprefix(" ") == text.removeprefix(" ")


def test_log_probabilities_hold_spaces_bytes_and_offsets(vocabularies):
    tokenizer = vocabularies["byte fallback"]
    text = "the row 漢 row"
    ids = tokenizer.encode(text)
    entries = [TokenLogprob(i, -1.0, [(i, -1.0)]) for i in ids]
    (chat, plain) = (Shape(chat=chat, model="m", tokenizer=tokenizer).logprobs(0, entries) for chat in (True, False))
    assert bytes(byte for entry in chat["content"] for byte in entry["bytes"]).decode() == text
    whole = [entry["token"] for entry in chat["content"] if not entry["token"].startswith("bytes:")]
    assert " " in whole and [e["token"] for e in chat["content"]] == plain["tokens"]
    torn = [token for token in plain["tokens"] if token.startswith("bytes:")]
    assert torn == [f"bytes:\\x{byte:02x}" for byte in "漢".encode()]
    position = plain["tokens"].index(torn[0])
    assert plain["text_offset"][position : position + 3] == [text.index("漢")] * 3
    for token, offset in zip(plain["tokens"], plain["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset : offset + len(token)] == token
    # chunks of a stream go on where the last one ended
    streamed = Shape(chat=False, model="m", tokenizer=tokenizer)
    offsets = [offset for entry in entries for offset in streamed.logprobs(0, [entry])["text_offset"]]
    assert offsets == plain["text_offset"]


def test_alternatives_with_the_same_text_are_kept_apart(vocabularies):
    tokenizer = vocabularies["byte fallback"]
    letter, byte = tokenizer.encode("A")[0], 1 + ord("A")
    assert tokenizer.token_bytes(letter) == tokenizer.token_bytes(byte) == b"A" and letter != byte
    top = [(letter, math.log(0.5)), (byte, math.log(0.3)), (1 + 0xE6, math.log(0.1)), (1 + 0xE7, math.log(0.1))]
    shape = Shape(chat=False, model="m", tokenizer=tokenizer)
    (found,) = shape.logprobs(0, [TokenLogprob(letter, top[0][1], top)])["top_logprobs"]
    assert found == dict(zip(("A", f"token_id:{byte}", "bytes:\\xe6", "bytes:\\xe7"), (p for _, p in top), strict=True))


def test_tokens_written_are_the_answer(client, tiny_checkpoint):
    """Through the API: the tokens' bytes are the text's, where no end token stopped it."""
    body = {
        **ASK,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
        "max_tokens": 40,
        "temperature": 1.5,
        "seed": 7,
    }
    answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    special = set(load_tokenizer(tiny_checkpoint).special)
    kept = [entry for entry in answer["logprobs"]["content"] if entry["token"] not in special]
    joined = bytes(byte for entry in kept for byte in entry["bytes"])
    assert joined.decode(errors="replace") == answer["message"]["content"]

"""Byte tokens are decoded by the definition of UTF-8, each stray byte as U+FFFD."""

from __future__ import annotations

import random

from llama_vocabulary import llama_vocabulary

from luban.tokenizer.exact import ByteFallbackDecoder


def by_definition(data: bytes) -> str:
    """The character that begins at each byte, if any; else U+FFFD for this byte."""
    text, at = "", 0
    while at < len(data):
        for size in range(1, 5):
            try:
                character = data[at : at + size].decode()
            except UnicodeDecodeError:
                continue
            break
        else:
            character, size = "\ufffd", 1
        text, at = text + character, at + size
    return text


def test_stray_bytes_and_characters_in_one_run():
    model = llama_vocabulary()
    decoder, vocabulary = ByteFallbackDecoder.of(model), model.get_vocab()
    draw = random.Random()
    pieces = [
        "a",
        "é",
        "漢",
        "😀",
        "\ufffd",
        "\0",
        b"\xff",
        b"\xc3",
        b"\xe6\xbc",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"\xc0\x80",
    ]
    for _ in range(200):
        chosen = draw.choices(pieces, k=draw.randrange(1, 12))
        data = b"".join(p.encode() if isinstance(p, str) else p for p in chosen) + draw.randbytes(draw.randrange(4))
        ids = [vocabulary["x"], *(vocabulary[f"<0x{byte:02X}>"] for byte in data), vocabulary["x"]]
        assert decoder.decode(ids) == f"x{by_definition(data)}x"

"""The bytes that a token stands for, as its vocabulary's decoder writes them in the middle of a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import tokenizers

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # how SentencePiece spells a space


class Pieces:
    """Token id → bytes, so that those of all tokens of a text are the text's.

    A decoder drops the space before a text's first token; here every token has its own.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        self.model = model
        self.added = {i: token.content for i, token in model.get_added_tokens_decoder().items()}
        described = json.loads(model.to_str())["decoder"]
        self.decoders = {str(part.get("type")): part for part in _parts(described)} if described else {}

    def __call__(self, token: int) -> bytes:
        """The token's bytes; none for an id outside of the vocabulary."""
        if token in self.added:
            return self.added[token].encode()
        spelled = self.model.id_to_token(token)
        if spelled is None:
            return b""
        if "ByteLevel" in self.decoders:
            table = _byte_values()
            return bytes(table[char] for char in spelled) if all(c in table for c in spelled) else spelled.encode()
        if "ByteFallback" in self.decoders and (byte := BYTE.fullmatch(spelled)):
            return bytes([int(byte[1], 16)])
        if wordpiece := self.decoders.get("WordPiece"):
            prefix = wordpiece.get("prefix", "##")
            return (spelled.removeprefix(prefix) if spelled.startswith(prefix) else " " + spelled).encode()
        if suffixed := self.decoders.get("BPEDecoder"):
            return spelled.replace(suffixed.get("suffix", "</w>"), " ").encode()
        return spelled.replace(SPACE, " ").encode() if self.decoders else spelled.encode()


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder and those that it is made of."""
    yield decoder
    for part in decoder.get("decoders") or ():
        yield from _parts(part)


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes (GPT-2): printable ones themselves, the rest from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}

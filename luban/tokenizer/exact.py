"""Corrections that make imported vocabularies give SentencePiece's ids, where the `tokenizers` library departs from it.

Three departures are put right when a tokenizer is opened; its `tokenizer.json` stays as it is, for others to read:

- The library finds every piece of a Unigram vocabulary in the text, and of others every word that is a piece, special
  tokens (`</s>`) and bytes (`<0x41>`) included. A character of each such piece is exchanged for another code point, in
  the text and in all other pieces, so that no text spells them.
- Its normalizer `Precompiled` loses vowel signs and accents (see luban.tokenizer.charsmap).
- Its decoder `ByteFallback` makes a whole run of bytes U+FFFD where one of them is no text (see `ByteFallbackDecoder`).
"""

from __future__ import annotations

import base64
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from luban.core.errors import DataError
from luban.tokenizer.charsmap import Charsmap, charsmap

EXCHANGED = 0x10F000  # added to a character's code point (of the private use plane 16, which no text has)
EXCHANGEABLE = 0xE00  # code points below which a character can be exchanged
BYTES = 0x10FE00  # the code point that stands for byte 0 while tokens are joined
BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # ▁, how SentencePiece writes a space
WHOLE_WORDS = (tokenizers.models.Unigram, tokenizers.models.WordLevel, tokenizers.models.WordPiece)
PLAIN_SPLITS = frozenset(["Metaspace", "WhitespaceSplit", "Split", "Sequence"])  # pre-tokenizers that keep characters


def exact_encoder(model: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, Charsmap | None]:
    """(what to encode with, rules that text must go through before); `model` itself where the library does it right."""
    normalizer = None if model.normalizer is None else json.loads(model.normalizer.__getstate__())
    rules, rest = _without_rules(normalizer)
    splits = None if model.pre_tokenizer is None else json.loads(model.pre_tokenizer.__getstate__())
    reaches = isinstance(model.model, WHOLE_WORDS) and _types(splits) <= PLAIN_SPLITS
    if not reaches and rules is None:
        return model, None
    data = json.loads(model.to_str())
    data["normalizer"] = rest
    if reaches:
        _exchange(data)
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.encode_special_tokens = model.encode_special_tokens
    return made, rules


def _without_rules(normalizer: dict[str, Any] | None) -> tuple[Charsmap | None, dict[str, Any] | None]:
    """Precompiled rules that a normalizer begins with, and the rest of it."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if not steps or steps[0]["type"] != "Precompiled":
        return None, normalizer
    found = charsmap(base64.b64decode(steps[0]["precompiled_charsmap"]))
    return found, {"type": "Sequence", "normalizers": steps[1:]} if steps[1:] else None


def _types(part: dict[str, Any] | None) -> set[str]:
    """The names of all parts of a pre-tokenizer."""
    if part is None:
        return set()
    return {part["type"]}.union(*(_types(inner) for inner in part.get("pretokenizers", [])))


def _exchange(data: dict[str, Any]) -> None:
    """Make special tokens, the unknown one and bytes unreachable in a `tokenizer.json` of one of the models WHOLE_WORDS."""
    model, added = data["model"], {token["content"]: token["special"] for token in data["added_tokens"]}
    scored = isinstance(model["vocab"], list)  # [[piece, score], …] by id, else {piece: id}
    names = [piece for piece, _ in model["vocab"]] if scored else list(model["vocab"])
    falls_back = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token") or (names[model["unk_id"]] if model.get("unk_id") is not None else None)
    reserved = {
        name for name in names if added.get(name) or name == unknown or (falls_back and BYTE_NAME.fullmatch(name))
    }
    exchanged = _characters(
        reserved, [name for name in names if name not in reserved and name not in added], falls_back
    )
    table = {ord(character): EXCHANGED + ord(character) for character in exchanged}
    keep = reserved | added.keys()
    entries = model["vocab"] if scored else model["vocab"].items()
    renamed = [[name if name in keep else name.translate(table), value] for name, value in entries]
    model["vocab"] = renamed if scored else dict(renamed)
    if "continuing_subword_prefix" in model:
        model["continuing_subword_prefix"] = model["continuing_subword_prefix"].translate(table)
    pairs = [(chr(EXCHANGED + ord(c)), "\ufffd") for c in exchanged]  # a text that has these code points loses them
    pairs += [(c, chr(EXCHANGED + ord(c))) for c in exchanged]
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    before = [] if data["normalizer"] is None else [data["normalizer"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": [*before, *steps]} if steps else data["normalizer"]


def _characters(reserved: Iterable[str], others: Sequence[str], falls_back: bool) -> list[str]:
    """One character of every reserved piece, as few as there are, and rather those that few other pieces have.

    Where a character that is no piece by itself is spelled in bytes, they must be its own, so that only those that are
    pieces are taken.
    """
    alone, used = set(others), Counter(character for name in others for character in set(name))
    chosen: list[str] = []
    for name in sorted(reserved, key=lambda name: (len(name), name)):
        usable = [c for c in name if ord(c) < EXCHANGEABLE and c not in (SPACE, " ") and (c in alone or not falls_back)]
        if usable and not set(usable) & set(chosen):
            chosen.append(min(usable, key=lambda c: (c.isalnum(), used[c], c)))
    return chosen


class ByteFallbackDecoder:
    """Joins tokens of a vocabulary that spells rare characters in bytes (`<0xE6><0xBC><0xA2>` is 漢).

    Of a run of bytes every whole character is text, and each byte that belongs to none is U+FFFD, as in SentencePiece. A
    special token ends a run, whether it is shown or not.

    Args:
        model: the vocabulary, whose decoder has the part `ByteFallback`.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model
        steps = json.loads(model.decoder.__getstate__())
        steps = [step for step in steps.get("decoders", [steps]) if step["type"] != "ByteFallback"]
        stub = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": steps},
            "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"},
        }
        self._decoder = tokenizers.Tokenizer.from_str(json.dumps(stub)).decoder

    @classmethod
    def of(cls, model: tokenizers.Tokenizer) -> ByteFallbackDecoder | None:
        """The decoder of `model`, or None where it spells nothing in bytes."""
        if model.decoder is None:
            return None
        state = json.loads(model.decoder.__getstate__())
        falls_back = any(step["type"] == "ByteFallback" for step in state.get("decoders", [state]))
        return cls(model) if falls_back else None

    @cached_property
    def _tokens(self) -> tuple[dict[int, str], frozenset[int]]:
        """(id → token, bytes as single characters; ids of special tokens)."""
        special = frozenset(i for i, token in self._model.get_added_tokens_decoder().items() if token.special)
        names = {}
        for name, i in self._model.get_vocab(with_added_tokens=True).items():
            byte = BYTE_NAME.fullmatch(name)
            names[i] = chr(BYTES + int(byte[1], 16)) if byte else name
        return names, special

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; those outside the vocabulary give none."""
        names, special = self._tokens
        tokens, skipped = [], False
        for i in ids:
            if skip_special and i in special:
                skipped = True
            elif (token := names.get(i)) is not None:
                if skipped and tokens and _RUN.fullmatch(token):
                    tokens.append(END)
                tokens.append(token)
                skipped = False
        return _RUN.sub(_run_text, self._decoder.decode(tokens)).replace(END, "")


_RUN, END = re.compile(f"[{chr(BYTES)}-{chr(BYTES + 255)}]+"), chr(BYTES - 1)


def _run_text(run: re.Match[str]) -> str:
    """The text of bytes."""
    data, text = bytes(ord(character) - BYTES for character in run[0]), ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + "\ufffd" * (error.end - error.start)
            data = data[error.end :]
    return text


def require_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """`ids` as Python integers. Raises DataError for what is no token id."""
    found = []
    for given in ids:
        try:
            number = operator.index(given)
        except TypeError:
            number = -1
        if isinstance(given, bool) or not 0 <= number < 2**32:
            raise DataError(f"token ids must be integers from 0 to {vocab_size - 1}, and {given!r} is none")
        found.append(number)
    return found

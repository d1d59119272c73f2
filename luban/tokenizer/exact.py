"""Corrections for imported vocabularies, so that the `tokenizers` library gives SentencePiece's ids and text.

Three differences are corrected when a tokenizer is opened; its `tokenizer.json` isn't changed:

- `tokenizers` matches special tokens (`</s>`) and byte tokens (`<0x41>`) in plain text; SentencePiece doesn't. One
  character of each is replaced by a private-use code point in vocabulary and text.
- Its normalizer `Precompiled` loses vowel signs and accents (see luban.tokenizer.charsmap).
- Its decoder `ByteFallback` turns a whole byte run into U+FFFD if any byte is invalid (see `ByteFallbackDecoder`).
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

EXCHANGED = 0x10F000  # offset into private use plane 16, added to a replaced character's code point
EXCHANGEABLE = 0xE00  # only characters below this code point are replaced
BYTES = 0x10FE00  # placeholder code point of byte 0 while tokens are joined
BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # ▁, how SentencePiece writes a space
WHOLE_WORDS = (tokenizers.models.Unigram, tokenizers.models.WordLevel, tokenizers.models.WordPiece)
PLAIN_SPLITS = frozenset(["Metaspace", "WhitespaceSplit", "Split", "Sequence"])  # pre-tokenizers that keep characters


def exact_encoder(model: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, Charsmap | None]:
    """(tokenizer to encode with, normalisation rules to apply first); the tokenizer itself where no correction is needed."""
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
    """(the precompiled rules with which a normalizer begins, the rest of it)."""
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if not steps or steps[0]["type"] != "Precompiled":
        return None, normalizer
    found = charsmap(base64.b64decode(steps[0]["precompiled_charsmap"]))
    return found, {"type": "Sequence", "normalizers": steps[1:]} if steps[1:] else None


def _types(part: dict[str, Any] | None) -> set[str]:
    """Type names of a pre-tokenizer and of all pre-tokenizers inside it."""
    if part is None:
        return set()
    return {part["type"]}.union(*(_types(inner) for inner in part.get("pretokenizers", [])))


def _exchange(data: dict[str, Any]) -> None:
    """Change a `tokenizer.json` of one of the models WHOLE_WORDS so that plain text can't match its special, unknown and byte
    tokens."""
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
    pairs = [(chr(EXCHANGED + ord(c)), "\ufffd") for c in exchanged]  # these code points in a text become U+FFFD
    pairs += [(c, chr(EXCHANGED + ord(c))) for c in exchanged]
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    before = [] if data["normalizer"] is None else [data["normalizer"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": [*before, *steps]} if steps else data["normalizer"]


def _characters(reserved: Iterable[str], others: Sequence[str], falls_back: bool) -> list[str]:
    """The characters to replace.

    Greedy set cover: at least one character per reserved piece, preferring non-alphanumeric characters, then those rare
    in other pieces. With byte fallback only characters that are pieces themselves qualify, since others would be encoded
    as bytes.
    """
    alone, used = set(others), Counter(character for name in others for character in set(name))
    chosen: list[str] = []
    for name in sorted(reserved, key=lambda name: (len(name), name)):
        usable = [c for c in name if ord(c) < EXCHANGEABLE and c not in (SPACE, " ") and (c in alone or not falls_back)]
        if usable and not set(usable) & set(chosen):
            chosen.append(min(usable, key=lambda c: (c.isalnum(), used[c], c)))
    return chosen


class ByteFallbackDecoder:
    """Decodes tokens of a vocabulary with byte fallback (`<0xE6><0xBC><0xA2>` is 漢).

    Valid UTF-8 in a byte run is decoded; each stray byte becomes U+FFFD, as in SentencePiece. A special token ends a run,
    whether it is shown or not.

    Args:
        model: the tokenizer, whose decoder has a `ByteFallback` step.
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
        """The decoder of `model`; None if it has no byte fallback."""
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
        """Text of token ids; ids outside the vocabulary are skipped."""
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
_STRAY = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes the bytes 0x80 to 0xFF that are no UTF-8


def _run_text(run: re.Match[str]) -> str:
    """Decode a run of byte placeholders as UTF-8; each stray byte becomes U+FFFD. Time is linear in the run's length."""
    data = bytes(ord(character) - BYTES for character in run[0])
    return _STRAY.sub("\ufffd", data.decode(errors="surrogateescape"))


def require_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """`ids` as Python integers. Raises DataError if one isn't a token id."""
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

"""Vocabulary information for objectives: special tokens, word starts and sentence ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.data.shards import Shards
from luban.tokenizer.special import RESERVED
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

MASK = ("[MASK]", "<mask>", RESERVED[0])  # names that vocabularies give a special token; the first found is used
SEPARATOR = ("[SEP]", RESERVED[1])
START = ("<|startofpiece|>", "<sop>", RESERVED[2])  # of a blank's answer
STOP = ("<|endofpiece|>", "<eop>", RESERVED[3])
CLASS = ("[CLS]",)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """A vocabulary of V ids as objectives see it."""

    size: int  # V
    pad: int
    begin: int | None  # of a document
    end: int  # of a document
    special: np.ndarray  # (V,) bool: special tokens, never text
    continues: np.ndarray  # (V,) bool: goes on with the word of the token before it, if that one can be gone on with
    goes_on: np.ndarray  # (V,) bool: its word may go on in the next token
    ends_sentence: np.ndarray  # (V,) bool
    names: dict[str, int]  # special tokens

    @classmethod
    def of(cls, shards: Shards) -> SpecialTokens:
        """Those of the tokenizer that made the shards."""
        tokenizer = load_tokenizer(shards.path / "tokenizer")
        ids = range(tokenizer.vocab_size)
        special = np.zeros(tokenizer.vocab_size, dtype=bool)
        special[list(tokenizer.special.values())] = True
        texts = ["" if special[i] else _text(tokenizer, i) for i in ids]
        pieces = any(text.startswith("##") for text in texts)  # WordPiece marks what continues, the others what begins
        continues = [t.startswith("##") if pieces else _inside(t[:1]) for t in texts]
        goes_on = [pieces or _inside(t[-1:]) for t in texts]
        return cls(
            size=tokenizer.vocab_size,
            pad=shards.pad_id,
            begin=tokenizer.bos_id,
            end=shards.config["eos_id"],
            special=special,
            continues=np.array(continues),
            goes_on=np.array(goes_on) & ~special,
            ends_sentence=np.array([t.rstrip(" ")[-1:] in (*".!?\n。！？",) and t != "" for t in texts]),
            names=tokenizer.special,
        )

    def need(self, names: tuple[str, ...], what: str) -> int:
        """The id of the first of these special tokens that there is. Raises DataError where there is none."""
        found = next((self.names[name] for name in names if name in self.names), None)
        if found is None:
            raise DataError(
                f"the tokenizer has no {what} token: it needs one of {', '.join(names)} among its special ones"
            )
        return found

    @property
    def head(self) -> int:
        """Id of the first token of a classified row: the class token, or the token that begins documents."""
        found = next((self.names[name] for name in CLASS if name in self.names), self.begin)
        return self.end if found is None else found

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """(T,) bool: where a new word begins."""
        inside = self.continues[tokens]
        inside[1:] &= self.goes_on[tokens[:-1]]
        inside[:1] = False
        return ~inside


def _text(tokenizer: Tokenizer, index: int) -> str:
    """The text of one token, with its sign of continuation or of a space before it."""
    own = tokenizer.token(index) or ""
    if own.startswith("##"):
        return own
    text = tokenizer.decode([index])
    return " " + text if own.startswith("▁") and not text.startswith(" ") else text


def _inside(character: str) -> bool:
    """True if the character can be inside a word; U+FFFD (part of a character) can."""
    return character.isalnum() or character == "\ufffd"

"""Symbols, punctuation and case, each by a named policy."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from luban.core.errors import ConfigError, nearest
from luban.corpus.document import Document, conversation_text, rewrite_messages
from luban.corpus.tally import Tally

QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "‚": "'"})
DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
WIDE = str.maketrans({code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "})
PUNCTUATION = str.maketrans("，。！？：；（）、", ",.!?:;(),")
# Joiners (U+200C, U+200D) and directions stay: Persian, Indic scripts and emoji are spelled with them. A zero-width space
# ends a word in Khmer, Thai, Lao, Burmese and Tibetan, and means nothing elsewhere.
INVISIBLE = re.compile(
    "[\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\u200b(?![\u0e00-\u109f\u1780-\u17ff])|(?<![\u0e00-\u109f\u1780-\u17ff])\u200b"
)
SPACES = re.compile("[^\\S\n]+")
BLANK = re.compile("\n{3,}")

POLICIES: dict[str, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "quotes": lambda text: text.translate(QUOTES),
    "dashes": lambda text: text.translate(DASHES),
    "halfwidth": lambda text: text.translate(WIDE),  # full-width letters, digits and signs as ASCII
    "punctuation": lambda text: text.translate(PUNCTUATION),  # Chinese punctuation as ASCII
    "invisible": lambda text: INVISIBLE.sub("", text),  # zero-width and control characters that no script needs
    "spaces": lambda text: BLANK.sub("\n\n", "\n".join(map(_single_spaces, text.split("\n")))),
    "lower": str.lower,
}
DEFAULT = "nfc+invisible"


def _single_spaces(line: str) -> str:
    """A line with single spaces between words and none at its end; its indentation stays, as code needs it."""
    rest = SPACES.sub(" ", line).strip()
    indentation = line[: len(line) - len(line.lstrip(" \t"))]
    return indentation + rest if rest else ""


class Normalise:
    """`normalise` or `normalise=POLICY+POLICY…`, applied in that order. Raises ConfigError on an unknown policy."""

    def __init__(self, argument: str = DEFAULT):
        names = [name for name in (argument or DEFAULT).split("+") if name]
        for name in names:
            if name not in POLICIES:
                raise ConfigError(f"unknown normalisation '{name}'{nearest(name, POLICIES)}")
        self.policies = [POLICIES[name] for name in names]

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Every text and message by the policies; documents that change are counted."""
        yield from rewritten(documents, self.text, "documents_normalised", tally)

    def text(self, text: str) -> str:
        """One text by the policies."""
        for policy in self.policies:
            text = policy(text)
        return text


def rewritten(
    documents: Iterable[Document], rewrite: Callable[[str], str], counted: str, tally: Tally
) -> Iterator[Document]:
    """Documents with every text and message rewritten; how many changed is counted, and what is left empty dropped."""
    for document in documents:
        if document.messages is not None:
            messages = rewrite_messages(document.messages, rewrite)
            changed = replace(document, text=conversation_text(messages), messages=messages)
        else:
            text = rewrite(document.text)
            changed = document if text == document.text else replace(document, text=text)
        tally.add(counted, changed.text != document.text)
        if changed.text.strip() or not document.text.strip():  # a conversation may hold nothing but calls of tools
            yield changed
        else:
            tally.drop(f"{counted}: nothing left", document)

"""Exact match and F1 of short answers (SQuAD, Rajpurkar et al. 2016), for languages without spaces, too."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
SIGN = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])")


def normalised(text: str) -> str:
    """The text in lower case without punctuation and English articles, with single spaces (SQuAD's evaluation script).

    Departures: full-width forms become their plain ones and all of Unicode's punctuation is removed, not ASCII's alone.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    kept = (character for character in text if unicodedata.category(character)[0] not in "PS" or character in "$€£¥%")
    return " ".join(ARTICLES.sub(" ", "".join(kept)).split())


def answer_tokens(text: str) -> list[str]:
    """Words of the normalised text; each Chinese, Japanese or Korean sign is one."""
    return SIGN.sub(r" \1 ", normalised(text)).split()


def exact_match(answer: str, references: Iterable[str]) -> float:
    """1 where the normalised answer is one of the normalised references, else 0."""
    found = answer_tokens(answer)
    return float(any(found == answer_tokens(reference) for reference in references))


def f1(answer: str, references: Iterable[str]) -> float:
    """The largest over references of the harmonic mean of precision and recall of their words; 0 without references."""
    return max((_f1(answer_tokens(answer), answer_tokens(reference)) for reference in references), default=0.0)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def contains_answer(text: str, references: Iterable[str]) -> bool:
    """Whether the words of a reference stand in the text one after another (DPR's measure of a right passage)."""
    words = f" {' '.join(answer_tokens(text))} "
    return any((tokens := answer_tokens(reference)) and f" {' '.join(tokens)} " in words for reference in references)

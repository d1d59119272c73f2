"""The first sentence of a docstring, where it has one that stands for itself."""

from __future__ import annotations

import re

SHORTEST, LONGEST = 15, 200  # characters of a summary
USAGE = re.compile(r"^[\w.]+\(.*\)(\s*->.*)?$|^[\w.]+\(.*?\)\s*(->|--|:)\s*")  # `len(obj) -> int`
END = re.compile(r"[.!?](?=\s+[A-Z`'\"(]|\s*$)")
ABBREVIATED = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|Dr|Mr)\.$")


def summary(doc: str) -> str | None:
    """The first sentence of `doc` on one line, or None where there is none of fitting length."""
    for paragraph in re.split(r"\n\s*\n", doc.strip())[:2]:
        text = " ".join(paragraph.split())
        text = USAGE.sub("", text).strip()
        ends = (text[: end.end()] for end in END.finditer(text))
        text = next((sentence for sentence in ends if not ABBREVIATED.search(sentence)), text)
        if SHORTEST <= len(text) <= LONGEST and text[0].isalnum() and " " in text:
            return text if text[-1] in ".!?" else text + "."
    return None

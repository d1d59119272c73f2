"""C4's cleaning of web text (Raffel et al. 2020, section 2.2).

Departures: its list of words that nobody should say in company is not shipped, and repeated three-sentence
spans are left to deduplication.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from luban.corpus.document import Document
from luban.corpus.tally import Tally

ENDINGS = (".", "!", "?", '"', "”")  # what a sentence's line ends in
FEWEST_WORDS = 5  # of a line
FEWEST_SENTENCES = 3  # of a page
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
SENTENCE_END = re.compile(r"[.!?][\"”)]*(?:\s|$)")


def c4(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Keep the lines that read like sentences, drop pages that are left with too few. Conversations pass."""
    for document in documents:
        if document.messages is not None:
            yield document
            continue
        reason, text = clean(document.text)
        if reason:
            tally.drop(f"c4: {reason}", document)
            continue
        tally.add("c4_bytes_removed", document.bytes - len(text.encode()))
        yield replace(document, text=text)


def clean(text: str) -> tuple[str | None, str]:
    """(why the page is dropped or None, its cleaned text)."""
    lower = text.lower()
    if "lorem ipsum" in lower:
        return "lorem ipsum", ""
    if "{" in text:
        return "curly bracket", ""
    lines = [CITATION.sub("", line).strip() for line in text.splitlines()]
    kept = "\n".join(line for line in lines if _is_prose(line))
    if len(SENTENCE_END.findall(kept)) < FEWEST_SENTENCES:
        return "too few sentences", ""
    return None, kept


def _is_prose(line: str) -> bool:
    lower = line.lower()
    return (
        line.endswith(ENDINGS)
        and not line.endswith("...")
        and len(line.split()) >= FEWEST_WORDS
        and "javascript" not in lower
        and not any(policy in lower for policy in POLICIES)
    )

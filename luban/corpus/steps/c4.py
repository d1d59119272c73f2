"""C4's cleaning of web text (Raffel et al. 2020, section 2.2); its repeated three-sentence spans are the step `spans`.

Departure: C4 drops every page with a word of a public list of words nobody should say in company. No list is shipped:
`c4=FILE` takes one, a word or phrase a line.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from luban.core.errors import DataError
from luban.core.hashing import file_sha256
from luban.corpus.document import Document
from luban.corpus.tally import Tally

ENDINGS = (".", "!", "?", '"', "”")  # what a sentence's line ends in
FEWEST_WORDS = 5  # of a line
FEWEST_SENTENCES = 3  # of a page
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
SENTENCE_END = re.compile(r"[.!?][\"”)]*(?:\s|$)")
UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # scripts without spaces between words


class C4:
    """`c4` keeps the lines that read like sentences and drops pages left with too few; `c4=FILE` also drops pages with a
    word of the file's list, compared in lower case, whole words only (in scripts without spaces: anywhere).

    Conversations pass.

    Raises:
        DataError: no such file, or no word in it.
    """

    def __init__(self, argument: str = ""):
        self.bad = bad_words(Path(argument)) if argument else None
        if argument:
            self.identity = {"step": "c4", "bad_words": file_sha256(Path(argument))}

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """The cleaned pages; dropped ones are counted by reason."""
        for document in documents:
            if document.messages is not None:
                yield document
                continue
            reason, text = clean(document.text)
            if not reason and self.bad is not None and has_bad_word(self.bad, document.text.lower()):
                reason = "bad word"
            if reason:
                tally.drop(f"c4: {reason}", document)
                continue
            tally.add("c4_bytes_removed", document.bytes - len(text.encode()))
            yield replace(document, text=text)


def bad_words(file: Path) -> re.Pattern[str]:
    """A pattern of the words listed in a UTF-8 file, for text in lower case."""
    if not file.is_file():
        raise DataError(f"the list of bad words {file} does not exist")
    listed = sorted({line.strip().lower() for line in file.read_text(encoding="utf-8").splitlines()} - {""})
    if not listed:
        raise DataError(f"the list of bad words {file} holds no word")
    spaced = "|".join(re.escape(word) for word in listed if not UNSPACED.search(word))
    unspaced = [re.escape(word) for word in listed if UNSPACED.search(word)]
    return re.compile("|".join([rf"(?<!\w)(?:{spaced})(?!\w)", *unspaced] if spaced else unspaced))


def has_bad_word(bad: re.Pattern[str], lower: str) -> bool:
    """True if a lower-case text contains a listed word, not followed by a combining mark (which makes it another word)."""
    return any(unicodedata.category(lower[f.end() : f.end() + 1] or " ")[0] != "M" for f in bad.finditer(lower))


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

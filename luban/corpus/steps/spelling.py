"""Spelling repair, for those who ask for it: only what is almost certainly a slip of the fingers is changed.

Candidates come from symmetric deletes (Garbe 2012, symspellpy) over a frequency dictionary, one edit away (an insertion,
deletion, replacement or transposition; Damerau 1964). A word is left alone that is in the dictionary, is short, has a
capital letter, an accent or a sign of a script without cases, touches a digit, underscore, hyphen, slash or another sign
of code and addresses, occurs more than once in its text (then its writer means it), extends a known word by a usual
prefix or suffix, is the spelling of the other side of the Atlantic, or has no frequent candidate far ahead of all others. Lines that look like code are left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from luban.core.errors import ConfigError, DataError, MissingExtra
from luban.core.hashing import file_sha256
from luban.corpus.document import Document, conversation_text, rewrite_messages
from luban.corpus.languages import is_determined, matches
from luban.corpus.tally import Tally

ACCENTS = "\u0300-\u036f"  # combining marks, of which \w knows nothing
WORD = re.compile(
    rf"(?<![\w{ACCENTS}@#$%&*+/\\<=>^_`{{|}}~.:'’-])[a-z]{{5,30}}(?![\w{ACCENTS}@#$%&*+/\\<=>^_`{{|}}~('’-]|[.:]\w)"
)
CODE = re.compile(r"^(?: {4}|\t)|[{};=<>_`\\|]|\(\)|::|->|https?:")
PREFIXES = ("un", "re", "non", "pre", "sub", "over", "under", "multi", "anti", "inter", "out", "mis", "de", "co")
SUFFIXES = (
    "s",
    "es",
    "d",
    "ed",
    "r",
    "er",
    "ers",
    "ing",
    "ly",
    "ness",
    "like",
    "less",
    "able",
    "ish",
    "y",
    "al",
    "ism",
    "ist",
    "ists",
    "ity",
    "isation",
    "ization",
    "ise",
    "ize",
    "ised",
    "ized",
    "th",
    "st",
    "est",
)
VARIANTS = [
    (re.compile(pattern), by)
    for pattern, by in (
        ("our", "or"),
        ("re(s|d)?$", r"er\1"),
        ("is(e|i|a)", r"iz\1"),
        ("ys(e|i)", r"yz\1"),
        ("ll", "l"),
        ("[ao]e", "e"),
        ("c(e|i)", r"s\1"),
        ("ogue", "og"),
        ("wards", "ward"),
        ("mme", "m"),
        ("s$", ""),
        ("t$", "ed"),
        ("e?ment", "ment"),
    )
]
FREQUENT = 2e-6  # share of all words that a candidate must have
AHEAD = 20  # times as frequent as the second candidate that the first must be
ENGLISH = "frequency_dictionary_en_82_765.txt"  # symspellpy's: Google Books counts of words that SCOWL lists


class Spelling:
    """`spelling` repairs English, `spelling=LANG:FILE` another language by a file of lines `word count`.

    Documents known to be in another language pass.

    Raises:
        ConfigError: an argument that is no LANG:FILE.
        DataError: no such file, or no word in it.
    """

    def __init__(self, argument: str = ""):
        self.lang, given, name = argument.partition(":") if argument else ("en", "", "")
        if argument and not (self.lang and given and name):
            raise ConfigError(f"spelling={argument}: LANG:FILE is needed, such as de:words.txt")
        file = Path(name) if name else None
        if file is not None and not file.is_file():
            raise DataError(f"the dictionary {file} does not exist")
        self.words = _dictionary(file)
        self.total = sum(self.words.words.values())
        if not self.total:
            raise DataError(f"the dictionary {file} holds no line 'word count'")
        self.identity = {"step": "spelling", "lang": self.lang, "dictionary": file_sha256(file) if file else ENGLISH}
        self.repaired = lru_cache(maxsize=1 << 16)(self._repaired)

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Texts and messages repaired; words are counted and the first few of a part shown."""
        for document in documents:
            if is_determined(document.lang) and not matches(document.lang or "", self.lang):
                yield document
                continue
            changes: list[tuple[str, str]] = []
            if document.messages is None:
                changed = replace(document, text=self.text(document.text, changes))
            else:
                messages = rewrite_messages(document.messages, partial(self.text, changes=changes))
                changed = replace(document, text=conversation_text(messages), messages=messages)
            if changes:
                tally.add("documents_respelled")
                tally.add("words_respelled", len(changes))
                tally.show("spelling", changed, ", ".join(f"{before} → {after}" for before, after in changes))
            yield changed if changes else document

    def text(self, text: str, changes: list[tuple[str, str]]) -> str:
        """One text repaired; what was changed is appended to `changes`."""
        suspects = Counter(word for word in WORD.findall(text) if self.repaired(word) != word)
        once = {word for word, count in suspects.items() if count == 1 and text.count(word) == 1}
        if not once:
            return text

        def repair(found: re.Match[str]) -> str:
            word = found[0]
            if word not in once:
                return word
            changes.append((word, self.repaired(word)))
            return self.repaired(word)

        lines = text.split("\n")
        return "\n".join(line if CODE.search(line) else WORD.sub(repair, line) for line in lines)

    def _repaired(self, word: str) -> str:
        """The word, or the one that was almost certainly meant."""
        known = self.words.words
        if word in known or self._derived(word):
            return word
        found = [c for c in self.words.lookup(word, _everything(), max_edit_distance=1) if c.term[0] == word[0]]
        found = sorted((c for c in found if c.term.isalpha()), key=lambda c: (-c.count, c.term))
        if not found or found[0].count < FREQUENT * self.total or _plain(found[0].term) == _plain(word):
            return word
        return found[0].term if len(found) == 1 or found[0].count >= AHEAD * found[1].count else word

    def _derived(self, word: str) -> bool:
        """True if the word is a known one with a common prefix or suffix."""
        known = self.words.words
        stems = [word.removesuffix(ending) for ending in SUFFIXES if word.endswith(ending)]
        stems += [stem + "e" for stem in stems] + [stem[:-1] for stem in stems if stem[-2:-1] == stem[-1:]]
        stems += [stem[: -len("i")] + "y" for stem in stems if stem.endswith("i")]
        stems += [word.removeprefix(beginning) for beginning in PREFIXES if word.startswith(beginning)]
        return any(len(stem) >= 3 and stem in known for stem in stems)


def _plain(word: str) -> str:
    """A word as others may spell it: `colours` and `color` are one."""
    for pattern, by in VARIANTS:
        word = pattern.sub(by, word)
    return word


@lru_cache(maxsize=2)
def _dictionary(file: Path | None) -> Any:
    """The dictionary, indexed for one edit."""
    try:
        from symspellpy import SymSpell
    except ImportError:
        raise MissingExtra("symspellpy", "corpus", "spelling repair") from None
    words = SymSpell(max_dictionary_edit_distance=1)
    if file is not None:
        words.load_dictionary(file, 0, 1, encoding="utf-8")
        return words
    with resources.as_file(resources.files("symspellpy").joinpath(ENGLISH)) as path:
        words.load_dictionary(path, 0, 1, encoding="utf-8")
    return words


def _everything() -> Any:
    from symspellpy import Verbosity

    return Verbosity.ALL

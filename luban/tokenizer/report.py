"""How well a vocabulary fits texts: bytes a token, tokens a word, which tokens are used, beside other vocabularies."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from luban.core.errors import DataError
from luban.core.rounds import rounds
from luban.tokenizer.tokenizer import Tokenizer

ROUND = 4 << 20  # characters encoded at a time
PIECE = 64 << 10  # characters after which a file is cut at a line end, so that its pieces are encoded in parallel
# A word is a run of non-space characters; a sign of a script without spaces is one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
DOMAINS = {
    **dict.fromkeys((".py", ".c", ".h", ".cc", ".cpp", ".js", ".ts", ".rs", ".go", ".java", ".sh", ".sql"), "code"),
    **dict.fromkeys((".html", ".htm", ".xml", ".css", ".tex", ".rst", ".md"), "markup"),
    **dict.fromkeys((".json", ".jsonl", ".csv", ".toml", ".yaml", ".yml"), "data"),
}  # other endings are prose


@dataclass(frozen=True)
class Sample:
    """A text to measure on."""

    text: str
    name: str  # of the file or source
    language: str  # code, or "unknown"
    domain: str  # prose, code, markup, data, or a corpus's source


@dataclass
class Fit:
    """Texts of one kind under one vocabulary."""

    bytes: int = 0  # UTF-8 bytes
    words: int = 0
    tokens: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (vocab_size,) how often each id occurs
    beside: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # other vocabulary → its tokens

    @property
    def bytes_per_token(self) -> float:
        """Compression: UTF-8 bytes a token carries."""
        return self.bytes / max(self.tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens a word is split into, on average."""
        return self.tokens / max(self.words, 1)

    def against(self, other: str) -> float:
        """Tokens of another vocabulary for each token of this one: above 1, this one is shorter."""
        return self.beside[other] / max(self.tokens, 1)

    @property
    def used(self) -> float:
        """Share of the vocabulary that occurs."""
        return float((self.counts > 0).mean())


@dataclass
class Report:
    """A vocabulary on texts, grouped by name, by language and by domain."""

    tokenizer: Tokenizer
    names: dict[str, Fit]
    languages: dict[str, Fit]
    domains: dict[str, Fit]
    total: Fit

    def unused(self) -> list[int]:
        """Ids of learned tokens that never occur: special tokens and single bytes do not count."""
        fixed = set(self.tokenizer.special.values())
        ids = [i for i in np.flatnonzero(self.total.counts == 0).tolist() if i not in fixed]
        return [i for i in ids if len(self.tokenizer.decode([i])) > 1]

    def longest(self, amount: int) -> list[str]:
        """The longest tokens, longest first."""
        spelled = {self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)}
        return sorted(spelled, key=lambda piece: (-len(piece), piece))[:amount]


def measure(tokenizer: Tokenizer, samples: Iterable[Sample], beside: dict[str, Tokenizer] | None = None) -> Report:
    """Encode the samples under a vocabulary and others, in bounded memory.

    Raises:
        DataError: there is no text.
    """
    size = tokenizer.vocab_size
    groups: tuple[dict[str, Fit], ...] = tuple(
        defaultdict(lambda: Fit(counts=np.zeros(size, np.int64))) for _ in range(4)
    )
    names, languages, domains, totals = groups
    for batch in rounds(samples, lambda each: len(each.text), ROUND):
        texts = [sample.text for sample in batch]
        encoded = tokenizer.encode_batch(texts)
        others = {name: [len(ids) for ids in other.encode_batch(texts)] for name, other in (beside or {}).items()}
        for place, (sample, ids) in enumerate(zip(batch, encoded, strict=True)):
            counts = np.bincount(ids, minlength=size) if ids else 0
            told, words = len(sample.text.encode()), sum(1 for _ in WORD.finditer(sample.text))
            for fit in (names[sample.name], languages[sample.language], domains[sample.domain], totals[""]):
                fit.bytes += told
                fit.words += words
                fit.tokens += len(ids)
                fit.counts += counts
                for name, lengths in others.items():
                    fit.beside[name] += lengths[place]
    if not totals:
        raise DataError("there is no text to measure the vocabulary on")
    return Report(tokenizer, names, languages, domains, totals[""])


def file_texts(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces of about PIECE that end at line ends.

    Raises:
        DataError: no such file, or nothing in it.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file")
    held, size, found = [], 0, False
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            held.append(line)
            size += len(line)
            if size >= PIECE:
                yield "".join(held)
                held, size, found = [], 0, True
    if not held and not found:
        raise DataError(f"{path} is empty")
    if held:
        yield "".join(held)

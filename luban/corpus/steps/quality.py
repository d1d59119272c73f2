"""Steps that judge by a model: n-gram perplexity (CCNet, Wenzek et al. 2020) and a linear classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from luban.core.artifact import read_manifest
from luban.core.errors import ConfigError
from luban.corpus.document import Document
from luban.corpus.quality.linear import LinearModel
from luban.corpus.quality.ngram import NgramModel
from luban.corpus.tally import Tally


class Perplexity:
    """`perplexity=MODEL` notes each document's perplexity in its meta; `perplexity=MODEL@500` also drops those above."""

    def __init__(self, argument: str):
        path, self.most = _limit(argument, "perplexity")
        self.model = NgramModel.load(path)
        self.identity = {"step": "perplexity", "model": read_manifest(path).content_hash, "most": self.most}

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Conversations pass."""
        for document in documents:
            if document.messages is not None:
                yield document
                continue
            found = self.model.perplexity(document.text)
            if self.most is not None and found > self.most:
                tally.drop("perplexity", document)
                continue
            yield replace(document, meta={**(document.meta or {}), "perplexity": round(found, 2)})


class Classifier:
    """`classifier=MODEL` notes each document's score as its quality; `classifier=MODEL@0.5` also drops those below."""

    def __init__(self, argument: str):
        path, self.least = _limit(argument, "classifier")
        self.model = LinearModel.load(path)
        self.identity = {"step": "classifier", "model": read_manifest(path).content_hash, "least": self.least}

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Conversations pass."""
        for document in documents:
            if document.messages is not None:
                yield document
                continue
            score = self.model.score(document.text)
            if self.least is not None and score < self.least:
                tally.drop("classifier", document)
                continue
            yield replace(document, quality=round(score, 6))


def _limit(argument: str, step: str) -> tuple[str, float | None]:
    """MODEL@LIMIT apart. Raises ConfigError where one of them is not what it should be."""
    path, given, limit = argument.partition("@")
    try:
        if not path:
            raise ValueError
        return path, float(limit) if given else None
    except ValueError:
        raise ConfigError(f"{step}={argument}: MODEL or MODEL@NUMBER is needed") from None

"""The sentences of passages that fit a question best, for models that whole passages confuse."""

from __future__ import annotations

from collections.abc import Sequence

from luban.core.bm25 import BM25, words
from luban.retrieval.passages.sentences import sentences


def excerpts(question: str, texts: Sequence[str], count: int) -> list[str]:
    """Of each text the sentences that are among the `count` best of all texts for the question by BM25, in their order; "" of
    a text without any. Equal scores go by order."""
    spans = [(number, text[start:stop]) for number, text in enumerate(texts) for start, stop in sentences(text)]
    scores = BM25([words(sentence) for _, sentence in spans]).scores(words(question))
    best = sorted(sorted(range(len(spans)), key=lambda i: -scores[i])[:count])
    return [" ".join(spans[i][1] for i in best if spans[i][0] == number) for number in range(len(texts))]

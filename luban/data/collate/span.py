"""Batches of span corruption: spans become sentinels, and the decoder writes each sentinel with its span (T5, Raffel et
al. 2020, section 3.1.4 and figure 2)."""

from __future__ import annotations

import numpy as np

from luban.core.errors import DataError
from luban.data.batch import Batch
from luban.data.collate.rows import DocumentPieces
from luban.data.collate.source import source_batch
from luban.data.collate.special_tokens import SpecialTokens
from luban.data.shards import Shards


def span_amounts(size: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(tokens in spans, spans) of a text of `size` tokens."""
    inside = min(max(round(rate * size), 1), size - 1)
    return inside, min(max(round(inside / mean_span), 1), size - inside)


def corrupt(text: list[int], kept: list[int], spans: list[int], first_sentinel: int) -> tuple[list[int], list[int]]:
    """(source, target): runs of kept and spanned tokens take turns, of these lengths, kept first."""
    source: list[int] = []
    target: list[int] = []
    at = 0
    for i, (keep, span) in enumerate(zip(kept, spans, strict=True)):
        source += [*text[at : at + keep], first_sentinel + i]
        target += [first_sentinel + i, *text[at + keep : at + keep + span]]
        at += keep + span
    return source, [*target, first_sentinel + len(spans)]


def random_parts(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` positive numbers, every way equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.array([], dtype=int)
    return np.diff([0, *cuts.tolist(), total]).tolist()


class SpanRows(DocumentPieces):
    """A source of at most T tokens, and a target as long as it can get, T too.

    Args:
        rate: share of the tokens in spans. mean_span: tokens a span, on average.
        sentinels: ids behind the tokenizer's. start: id that the decoder begins with.
    """

    def __init__(
        self, shards: Shards, seq_len: int, seed: int, *, rate: float, mean_span: float, sentinels: int, start: int
    ):
        fitting = (n for n in range(seq_len - 1, 1, -1) if sum(span_amounts(n, rate, mean_span)) + 2 <= seq_len)
        longest = next(fitting, 1)  # in the source spans shrink, so its own length is enough there
        super().__init__(shards, longest=longest, shortest=2, seed=seed)
        inside, spans = span_amounts(longest, rate, mean_span)
        if spans + 1 > sentinels:
            raise DataError(
                f"rows of {seq_len} tokens have {spans} spans and need {spans + 1} sentinels, and objective."
                f"sentinels is {sentinels}"
            )
        self.rate, self.mean_span, self.start = rate, mean_span, start
        self.seq_len, self.special = seq_len, SpecialTokens.of(shards)
        self.target_len = inside + spans + 2

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch."""
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        for row, epoch in places:
            source, target = self.row(row, epoch) if row >= 0 else ([], [])
            sources.append([*source, self.special.end] if source else [])
            targets.append([*target, self.special.end] if target else [])
        return source_batch(
            sources,
            targets,
            start=self.start,
            pad=self.special.pad,
            source_len=self.seq_len,
            target_len=self.target_len,
        )

    def row(self, row: int, epoch: int) -> tuple[list[int], list[int]]:
        """(source, target) as this epoch draws them, without their ends."""
        rng, text = self.draw("spans", row, epoch), self.piece(row).tolist()
        inside, spans = span_amounts(len(text), self.rate, self.mean_span)
        kept = random_parts(rng, len(text) - inside, spans)
        return corrupt(text, kept, random_parts(rng, inside, spans), self.special.size)

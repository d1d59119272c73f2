"""Span corruption: spans become sentinels, and the decoder writes each sentinel with its span (T5, Raffel et al. 2020,
section 3.1.4 and figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.data.batch import Batch
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.objectives.denoising import source_batch, source_loss
from luban.objectives.family import Objective
from luban.objectives.rows import Pieces
from luban.objectives.vocabulary import Marks


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """15% of the tokens in spans of 3 on average; sentinel i is the i-th id behind the tokenizer's."""

    rate: float = 0.15  # share of the tokens in spans
    mean_span: float = 3.0  # tokens a span, on average
    sentinels: int = 100  # ids added behind the tokenizer's vocabulary

    bodies = ("encoder_decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if not 0 < self.rate < 1 or self.mean_span < 1 or self.sentinels < 2:
            raise ConfigError("rate must be between 0 and 1, mean_span at least 1, sentinels at least 2")

    def extra_ids(self) -> int:
        """The sentinels."""
        return self.sentinels

    def amounts(self, size: int) -> tuple[int, int]:
        """(tokens in spans, spans) of a text of `size` tokens."""
        inside = min(max(round(self.rate * size), 1), size - 1)
        return inside, min(max(round(inside / self.mean_span), 1), size - inside)

    def decoder_start(self, shards: Shards) -> int:
        """Padding, as T5's."""
        return shards.pad_id

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return Corrupted(self, shards, seq_len, seed)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of sentinels, spans and end."""
        return source_loss(module, *arrays)


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


class Corrupted(Pieces):
    """A source of at most T tokens, and a target as long as it can get, T too."""

    def __init__(self, config: SpanCorruption, shards: Shards, seq_len: int, seed: int):
        fitting = (n for n in range(seq_len - 1, 1, -1) if sum(config.amounts(n)) + 2 <= seq_len)
        longest = next(fitting, 1)  # in the source spans shrink, so its own length is enough there
        super().__init__(shards, longest=longest, shortest=2, seed=seed)
        inside, spans = config.amounts(longest)
        if spans + 1 > config.sentinels:
            raise DataError(f"rows of {seq_len} tokens have {spans} spans and need {spans + 1} sentinels, and objective."
                            f"sentinels is {config.sentinels}")  # fmt: skip
        self.config, self.seq_len, self.marks = config, seq_len, Marks.of(shards)
        self.target_len = inside + spans + 2

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch; the decoder begins with the padding token, as T5's."""
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        for row, epoch in places:
            source, target = self.row(row, epoch) if row >= 0 else ([], [])
            sources.append([*source, self.marks.end] if source else [])
            targets.append([*target, self.marks.end] if target else [])
        return source_batch(sources, targets, start=self.config.decoder_start(self.shards), pad=self.marks.pad, source_len=self.seq_len,
                            target_len=self.target_len)  # fmt: skip

    def row(self, row: int, epoch: int) -> tuple[list[int], list[int]]:
        """(source, target) as this epoch draws them, without their ends."""
        rng, text = self.draw("spans", row, epoch), self.piece(row).tolist()
        inside, spans = self.config.amounts(len(text))
        kept = random_parts(rng, len(text) - inside, spans)
        return corrupt(text, kept, random_parts(rng, inside, spans), self.marks.size)

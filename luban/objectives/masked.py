"""Masked language modelling: some places are hidden and predicted from both sides (BERT, RoBERTa, ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.objectives.causal import causal_loss, token_cross_entropy
from luban.objectives.family import Objective
from luban.objectives.pairing import FOLLOWS, OTHER, Pairing
from luban.objectives.rows import Changed, Pieces, rounded, stack
from luban.objectives.selection import Selection, Tokens
from luban.objectives.vocabulary import MASK, SEPARATOR, Marks


@dataclass(frozen=True, kw_only=True)
class Masked(Objective):
    """15% of the places are predicted; of these 80% become the mask token, 10% another token, 10% stay.

    BERT: `copies = 10` and next-sentence pairs. RoBERTa: the defaults. ALBERT: n-grams and sentence order.
    """

    rate: float = 0.15  # share of the text that is predicted
    masked: float = 0.8  # share of these that becomes the mask token
    random: float = 0.1  # share that becomes a random token; the rest stays
    selection: Selection = field(default_factory=Tokens)  # which places
    copies: int = 0  # different masks of a row, one epoch each and again (static, BERT: 10); 0: a new one every epoch
    pairing: Pairing | None = None  # pairs of segments, whose class is predicted too; none: packed documents

    bodies = ("encoder",)
    heads = ("masked_lm", "language_model")

    def __post_init__(self):
        if not (0 < self.rate <= 1 and self.masked >= 0 and self.random >= 0 and self.masked + self.random <= 1):
            raise ConfigError("rate must be in (0, 1], and masked and random shares that sum to at most 1")
        if self.copies < 0:
            raise ConfigError(f"copies must be at least 0, {self.copies} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """Pairs need an output of their own."""
        if self.pairing is not None and not getattr(head, "pair", False):
            raise ConfigError("pairs need a head with a second output: set model.head.pair = true")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows or pairs, with places hidden."""
        marks = Marks.of(shards)
        marks.need(MASK, "mask")
        if self.pairing is not None:
            return Pairs(self, self.pairing, shards, marks, seq_len, seed)

        def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
            return self.hide(batch, marks, seed, rows, epochs)

        return Changed(PACKINGS[packing](shards, seq_len), change)

    def hide(self, batch: Batch, marks: Marks, seed: int, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """The batch with places hidden; its targets are the tokens that stood there."""
        tokens, chosen = batch.tokens.copy(), np.zeros(batch.tokens.shape, dtype=bool)
        for i, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            if row >= 0:
                rng = generator(seed, "mask", row, epoch % self.copies if self.copies else epoch)
                open_T = (batch.documents[i] >= 0) & ~marks.special[batch.tokens[i]]
                tokens[i], chosen[i] = self.hide_row(rng, batch.tokens[i], open_T, marks)
        return replace(batch, tokens=tokens, targets=batch.tokens, loss_mask=chosen)

    def hide_row(self, rng: np.random.Generator, tokens: np.ndarray, open_T: np.ndarray,
                 marks: Marks) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """(tokens with places hidden, which places). The number of places is rounded at random, so its mean is exact."""
        budget = rounded(rng, self.rate * int(open_T.sum()))
        chosen = self.selection.choose(rng, open_T, marks.word_starts(tokens), budget)
        places = np.flatnonzero(chosen)
        kind = rng.random(len(places))
        ordinary = np.flatnonzero(~marks.special)
        hidden = tokens.copy()
        hidden[places[kind < self.masked]] = marks.need(MASK, "mask")
        other = places[(kind >= self.masked) & (kind < self.masked + self.random)]
        hidden[other] = rng.choice(ordinary, size=len(other))
        return hidden, chosen

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the hidden places; with pairs also of their class, weighted as a mean of its own."""
        if self.pairing is None:
            return causal_loss(module, *arrays)
        hidden_places, classes, count = self.parts(module, *arrays)
        return hidden_places + classes, count

    def parts(self, module: Any, *arrays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum over the hidden places, what is added for the pairs' classes, number of places) of a batch of pairs.

        Divided by the number of places both are means, of places and of pairs.
        """
        tokens, targets, loss_mask, documents, positions, segments, labels, weights = arrays
        hidden = module(tokens, documents=documents, positions=positions, segments=segments, output="hidden")
        total, count = token_cross_entropy(module, hidden, targets, loss_mask)
        classes = F.cross_entropy(module.pairs(hidden).float(), labels, reduction="none")
        return total, (classes * weights).sum(), count


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Rows of two segments."""

    segments: np.ndarray  # (B, T) int64, 0 or 1
    labels: np.ndarray  # (B,) int64: 0 where the second segment follows the first
    weights: np.ndarray  # (B,) float32: hidden places a pair, so that dividing by all places leaves a mean over pairs

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loss reads."""
        return (*self.by_token(), self.segments, self.labels, self.weights)


class Pairs(Pieces):
    """A piece of a document, cut in two at a random word: class token, first, separator, second, separator."""

    def __init__(self, config: Masked, pairing: Pairing, shards: Shards, marks: Marks, seq_len: int, seed: int):
        super().__init__(shards, longest=seq_len - 3, shortest=4, seed=seed)
        self.config, self.pairing, self.marks, self.seq_len = config, pairing, marks, seq_len
        self.separator = marks.need(SEPARATOR, "separator")
        pairing.check(self)

    def pair(self, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(first, second, class) as this epoch draws them."""
        rng = self.draw("pair", row, epoch % self.config.copies if self.config.copies else epoch)
        piece = self.piece(row)
        words = np.flatnonzero(self.marks.word_starts(piece))[1:]
        cut = int(rng.choice(words)) if len(words) else len(piece) // 2
        one, two = piece[:cut], piece[cut:]
        label = int(rng.integers(2))
        if label == OTHER:
            one, two = self.pairing.spoil(rng, one, two, self, row)
        return one, two, label

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch, padded on the right."""
        rows, segments, labels = [], [], []
        for row, epoch in places:
            if row < 0:
                rows.append([])
                segments.append([])
                labels.append(FOLLOWS)
                continue
            one, two, label = self.pair(row, epoch)
            rows.append([self.marks.head, *one, self.separator, *two, self.separator])
            segments.append([0] * (len(one) + 2) + [1] * (len(two) + 1))
            labels.append(label)
        real = stack([np.zeros(len(row)) for row in rows], self.seq_len, -1, np.int32)
        tokens = stack(rows, self.seq_len, self.marks.pad)
        positions = np.where(real >= 0, np.arange(self.seq_len), 0).astype(np.int32)
        batch = Batch(tokens=tokens, targets=tokens, loss_mask=real >= 0, documents=real, positions=positions)
        numbers = [np.array(column) for column in zip(*places, strict=True)]
        batch = self.config.hide(batch, self.marks, self.seed, *numbers)
        pairs = max(sum(row >= 0 for row, _ in places), 1)
        weights = np.array([batch.tokens_trained / pairs if row >= 0 else 0 for row, _ in places], dtype=np.float32)
        return PairBatch(**vars(batch), segments=stack(segments, self.seq_len, 0),
                         labels=np.array(labels), weights=weights)  # fmt: skip

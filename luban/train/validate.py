"""Loss and bits per byte on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from luban.data.batch import Batch
from luban.data.loader import sequential_batches
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.parallel.engine import TrainEngine


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Loss of the model on held-out text."""

    loss: float  # nats a trained token
    tokens: int  # trained tokens it was measured on
    seq_len: int  # input tokens a row: what a token is predicted from, at the most
    bits_per_byte: float | None  # None where bytes mean nothing: conversations with a mask
    tasks: Mapping[str, float] = field(default_factory=dict)  # loss of each of several tasks
    metrics: Mapping[str, float] = field(
        default_factory=dict
    )  # means of what else the loss module measures, of one task

    def row(self) -> dict[str, float]:
        """As a row of metrics."""
        row = {"heldout_loss": self.loss, "heldout_tokens": self.tokens, "heldout_seq_len": self.seq_len}
        row |= {f"heldout_loss/{name}": loss for name, loss in self.tasks.items()}
        row |= {f"heldout_{name}": mean for name, mean in self.metrics.items()}
        return row if self.bits_per_byte is None else {**row, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a validator measures, in words."""

    name: str = "held-out loss"
    best: str = "lowest"
    sign: int = 1  # −1: the loss is what is measured, negated
    no_better: str = "the model is overfitting"  # what it means that there is no improvement

    def best_value(self, loss: float | None) -> str:
        """The best value, of the loss that a validation gave."""
        return "none" if loss is None else f"{self.sign * loss:.3f}"


class Validator:
    """Measures the same held-out batches each time.

    Bits per byte of the whole split are its summed loss / ln 2 / its UTF-8 bytes; where only `batches`
    batches are read, their rows are spread evenly over the split, and their mean loss stands for the rest.
    `rows` are those of an objective for which bits per byte mean nothing; without them the text is read as
    it stands. Several `tasks` are measured one after the other; the loss is then the mean of theirs, weighted by their
    shares.

    Args:
        tasks: share and rows of each.
    """

    measure = Measure()

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seq_len: int,
        batches: int,
        rows: Packing | None = None,
        tasks: Mapping[str, tuple[float, Packing]] | None = None,
    ):
        self.shards, self.rows, self.tasks = shards, rows, dict(tasks or {})
        self.batch_size, self.seq_len, self.batches = batch_size, seq_len, batches

    def batches_once(self, rows: Packing | None = None) -> Iterator[Batch]:
        """The batches, always the same, of other `rows` where they are given. Raises DataError where the split is smaller than
        one sequence."""
        return sequential_batches(self.shards, self.batch_size, self.seq_len, rows or self.rows, self.batches)

    def check(self) -> None:
        """Raise DataError where there is nothing to measure."""
        next(self.batches_once())

    def __call__(self, engine: TrainEngine) -> Validation:
        """Measure."""
        if not self.tasks:
            mean, tokens, metrics = self._mean(engine, self.batches_once())
            return Validation(
                loss=mean,
                tokens=tokens,
                seq_len=self.seq_len,
                bits_per_byte=self._bits_per_byte(mean),
                metrics=metrics,
            )
        found = {name: self._mean(engine, self.batches_once(rows)) for name, (_, rows) in self.tasks.items()}
        return Validation(
            loss=sum(share * found[name][0] for name, (share, _) in self.tasks.items()),
            tokens=sum(tokens for _, tokens, _ in found.values()),
            seq_len=self.seq_len,
            bits_per_byte=None,
            tasks={name: mean for name, (mean, *_) in found.items()},
        )

    @staticmethod
    def _mean(engine: TrainEngine, batches: Iterator[Batch]) -> tuple[float, int, dict[str, float]]:
        """(mean loss, trained tokens, means of metrics) of some batches."""
        total, tokens, metrics = 0.0, 0, dict[str, tuple[float, float]]()
        for batch in batches:
            found = engine.evaluate(batch)
            total, tokens = total + found.loss, tokens + found.targets
            for name, (part, count) in found.metrics.items():
                before, counted = metrics.get(name, (0.0, 0.0))
                metrics[name] = before + part, counted + count
        means = {name: summed / count for name, (summed, count) in metrics.items() if count}
        return total / max(tokens, 1), tokens, means

    def _bits_per_byte(self, mean: float) -> float | None:
        if self.shards.has_mask or self.rows is not None or not self.shards.bytes:
            return None
        targets = self.shards.tokens - self.shards.documents  # the first token of a document is given, not predicted
        return mean * targets / math.log(2) / self.shards.bytes

"""Figures of a task with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luban.core.metrics.bootstrap import interval, ratio_interval


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure."""

    name: str
    value: float
    interval: tuple[float, float] | None  # bootstrap over items, 95%; None: of a figure that has none
    n: int  # items behind it
    better: str = "higher"  # or lower
    note: str = ""  # how it was computed, where that is a choice

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        plain = {"value": self.value, "interval": list(self.interval) if self.interval else None, "n": self.n}
        return plain | {"better": self.better} | ({"note": self.note} if self.note else {})


def mean_of(rows: Sequence[dict[str, Any]], name: str, *, better: str = "higher") -> Measure:
    """The mean of a score that every row has."""
    scores = [float(row["scores"][name]) for row in rows]
    return Measure(name=name, value=float(np.mean(scores)), interval=interval(scores), n=len(scores), better=better)


def ratio_of(
    rows: Sequence[dict[str, Any]], name: str, above: str, below: str, *, exponential: bool = False, scale: float = 1.0
) -> Measure | None:
    """Σ `above` ÷ Σ `below` ÷ `scale` over the rows' scores, or its exponential; lower is better. None where Σ `below` is 0."""
    tops, bottoms = ([float(row["scores"][column]) for row in rows] for column in (above, below))
    if not all(bottoms):
        kept = [(t, b) for t, b in zip(tops, bottoms, strict=True) if b]
        tops, bottoms = [t for t, _ in kept], [b for _, b in kept]
    if not bottoms:
        return None
    found = [sum(tops) / sum(bottoms), *ratio_interval(tops, bottoms)]
    value, low, high = (math.exp(min(x / scale, 700.0)) if exponential else x / scale for x in found)
    return Measure(name=name, value=value, interval=(low, high), n=len(tops), better="lower")

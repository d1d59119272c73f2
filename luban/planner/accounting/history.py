"""Seventy years of training compute: systems that took more than any before them, and how fast their compute doubled.

The shipped table, `history.csv`, holds the record holders of Epoch AI's data set of notable models (epoch.ai/data, CC BY;
see Sevilla et al. 2022, Compute Trends Across Three Eras of Machine Learning) from Theseus in 1950 to July 2025, with
compute rounded to a tenth of a decade. Doubling times of record holders differ from those of all systems, which that paper
fits.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from math import isfinite, log2, log10
from pathlib import Path
from statistics import linear_regression

from luban.core.errors import ConfigError, DataError

TABLE = Path(__file__).with_name("history.csv")
BREAKS = (2010.0, 2016.0)  # deep learning's beginning; large-scale training's (Sevilla et al. 2022, section 3)
LEAST = 3  # systems that a fit takes
RESAMPLES = 2000


@dataclass(frozen=True)
class TrainedSystem:
    """A row of the table."""

    name: str
    date: date
    flops: float  # of its training
    source: str = ""

    @property
    def year(self) -> float:
        """The date as a year with a fraction."""
        first = date(self.date.year, 1, 1)
        return self.date.year + (self.date - first).days / (date(self.date.year + 1, 1, 1) - first).days


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Exponential growth fitted to the systems of one era by least squares on the logarithm."""

    start: float  # year of its first system
    end: float  # year of its last system
    systems: int
    doubling_months: float  # infinite: compute does not grow
    doubling_interval: tuple[float, float]  # months; 95%, by resampling the systems
    log10_at_start: float  # fitted FLOPs at the first system's date, as a power of ten
    log10_at_end: float


def read_history(path: Path = TABLE) -> list[TrainedSystem]:
    """Systems by date, of a CSV file with columns date (YYYY-MM-DD), system, and flop or log10_flop; source is optional.

    Raises:
        DataError: the file can't be read as that, with the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [c for c in ("date", "system") if c not in (reader.fieldnames or ())]
            if missing or not {"flop", "log10_flop"} & set(reader.fieldnames or ()):
                raise DataError(
                    f"{path}: needs the columns date, system and flop or log10_flop; "
                    f"it has {', '.join(reader.fieldnames or ()) or 'none'}"
                )
            systems = [_system(row, f"{path}, line {reader.line_num}") for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}") from None
    return sorted(systems, key=lambda system: system.date)


def _system(row: dict[str, str | None], where: str) -> TrainedSystem:
    try:
        flops = float(row["flop"] or "") if row.get("flop") else 10.0 ** float(row.get("log10_flop") or "")
        when = date.fromisoformat((row["date"] or "").strip())
    except (ValueError, OverflowError) as error:
        raise DataError(f"{where}: {error}") from None
    if not (isfinite(flops) and flops > 0):
        raise DataError(f"{where}: {flops} FLOPs; a number above 0 is needed")
    return TrainedSystem(row["system"] or "", when, flops, row.get("source") or "")


def trends(
    systems: Sequence[TrainedSystem], breaks: Sequence[float] = BREAKS, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Trend]:
    """One fit for each era between `breaks` (years) that has enough systems.

    Raises:
        ConfigError: breaks that don't ascend.
        DataError: no era has enough systems of different dates.
    """
    if list(breaks) != sorted(set(breaks)):
        raise ConfigError(f"breaks are years in ascending order, not {', '.join(f'{b:g}' for b in breaks)}")
    edges = [float("-inf"), *breaks, float("inf")]
    found = []
    for low, high in pairwise(edges):
        era = [(s.year, log10(s.flops)) for s in systems if low <= s.year < high]
        if len({x for x, _ in era}) >= LEAST:
            found.append(_fit(era, resamples, random.Random(seed)))
    if not found:
        raise DataError(f"a doubling time needs at least {LEAST} systems of different dates in one era")
    return found


def _fit(points: list[tuple[float, float]], resamples: int, draw: random.Random) -> Trend:
    slope, intercept = _line(points)
    start, end = min(x for x, _ in points), max(x for x, _ in points)
    slopes = []
    while len(slopes) < resamples:
        sample = draw.choices(points, k=len(points))
        if len({x for x, _ in sample}) > 1:
            slopes.append(_line(sample)[0])
    slopes.sort()
    low, high = slopes[int(0.025 * resamples)], slopes[min(int(0.975 * resamples), resamples - 1)]
    return Trend(
        start=start,
        end=end,
        systems=len(points),
        doubling_months=_months(slope),
        doubling_interval=(_months(high), _months(low)),
        log10_at_start=intercept + slope * start,
        log10_at_end=intercept + slope * end,
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    slope, intercept = linear_regression([x for x, _ in points], [y for _, y in points])
    return slope, intercept


def _months(slope: float) -> float:
    """Doubling time of a slope in decades a year; a slope that isn't positive has none."""
    return 12 / (slope * log2(10)) if slope > 0 else float("inf")

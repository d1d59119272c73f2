"""What a training run takes: FLOPs, GPU-hours, utilisation, money, energy and carbon, from each other.

Energy is GPU-hours times the GPU's power limit times the data centre's overhead (PUE), and carbon is energy times the grid's
intensity, as in Touvron et al. 2023 (LLaMA, section 6). FLOPs of a run are 6·N·D, without attention's scores (Kaplan et
al. 2020, section 2.1).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from luban.core.config import from_dict
from luban.core.errors import ConfigError
from luban.planner.accelerators import Accelerator

FOLDER = Path(__file__).parent
PERCENT = 0.01


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A row of `constants.toml`."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A row of `published.toml`: figures as their paper prints them."""

    source: str
    parameters: float
    tokens: float
    gpu_hours: float
    watts: float  # of one GPU
    tonnes: float  # of CO₂ equivalent
    mwh: float | None = None  # None: not printed


@cache
def constants() -> dict[str, Constant]:
    """The constants by name, with unit and source."""
    return _read("constants.toml", Constant)


@cache
def published_runs() -> dict[str, PublishedRun]:
    """Runs whose hours, energy and carbon their authors published."""
    return _read("published.toml", PublishedRun)


def _read(name: str, cls: type) -> dict[str, Any]:
    rows = tomllib.loads((FOLDER / name).read_text(encoding="utf-8"))
    return {key: from_dict(cls, row, key) for key, row in rows.items()}


def training_flops(parameters: float, tokens: float) -> float:
    """6·N·D: two FLOPs a weight and token in the forward pass, four in the backward pass."""
    return 6.0 * parameters * tokens


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What is saved."""

    gpu_hours: float
    price: float | None  # None: no price of a GPU-hour is known


@dataclass(frozen=True, kw_only=True)
class PointSaves:
    """What a point of utilisation is worth, in both senses of the word."""

    percentage_point: Saving  # utilisation rises by 0.01, e.g. from 43% to 44%, for the same FLOPs
    one_percent: Saving  # the run takes 1% fewer GPU-hours


@dataclass(frozen=True, kw_only=True)
class Account:
    """The account of one run. Field names are those of `luban account --json`."""

    flops: float
    gpu_hours: float
    utilisation: float  # FLOPs over what the GPUs could do at their bf16 peak in these hours, 0 to 1
    utilisation_assumed: bool  # neither given nor following from FLOPs and hours
    energy_mwh: float
    carbon_tonnes: float
    people_years: float  # years in which one person emits as much
    trees: float  # mature trees that take up as much in one year
    price: float | None  # of all GPU-hours; None: no price of one is known
    point_saves: PointSaves


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The constants that an account rests on; the defaults are those of `constants.toml`."""

    watts: float  # of one GPU
    pue: float
    carbon_intensity: float  # t a MWh
    person: float  # t a year
    tree: float  # t a year
    price_per_hour: float | None = None  # of one GPU

    def __post_init__(self) -> None:
        for name in ("watts", "carbon_intensity", "price_per_hour"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is a number from 0, not {value}")
        for name in ("person", "tree"):
            _positive(name, getattr(self, name))
        if not (isfinite(self.pue) and self.pue >= 1):
            raise ConfigError(f"pue is the data centre's energy over that of its GPUs, at least 1, not {self.pue}")


def assumptions(gpu: Accelerator, **changes: float | None) -> Assumptions:
    """The table's constants and the GPU's power limit, with those `changes` that aren't None."""
    names = ("pue", "carbon_intensity", "person", "tree")
    standard = Assumptions(watts=gpu.power, **{name: constants()[name].value for name in names})
    return replace(standard, **{name: value for name, value in changes.items() if value is not None})


def account(
    gpu: Accelerator,
    assumed: Assumptions,
    *,
    flops: float | None = None,
    gpu_hours: float | None = None,
    utilisation: float | None = None,
) -> Account:
    """The account of a run of which two of FLOPs, GPU-hours and utilisation are known, or one of the first two: utilisation
    is then that of `constants.toml`.

    Raises:
        ConfigError: nothing is known, all three are, a value is out of range, or utilisation comes out above 1.
    """
    for name, value in (("flops", flops), ("gpu_hours", gpu_hours), ("utilisation", utilisation)):
        if value is not None:
            _positive(name, value)
    if utilisation is not None and utilisation > 1:
        raise ConfigError(f"utilisation is a fraction from 0 to 1, not {utilisation:g}: 0.43 for 43%")
    if flops is None and gpu_hours is None:
        raise ConfigError("an account needs GPU-hours, or the FLOPs of a model and its tokens")
    guessed = utilisation is None and (flops is None or gpu_hours is None)
    if guessed:
        utilisation = constants()["utilisation"].value
    hourly = 3600 * gpu.peak_flops("bf16")
    if flops is not None and gpu_hours is not None:
        if utilisation is not None:
            raise ConfigError("utilisation follows from FLOPs and GPU-hours: leave one of the three out")
        utilisation = flops / (gpu_hours * hourly)
        if utilisation > 1:
            raise ConfigError(
                f"{flops:.3g} FLOPs in {gpu_hours:,.0f} GPU-hours are {utilisation:.2f} times the peak of "
                f"{gpu.names[0]}: at least {flops / hourly:,.0f} GPU-hours are needed"
            )
    assert utilisation is not None
    hours = flops / (hourly * utilisation) if gpu_hours is None else gpu_hours  # type: ignore[operator]
    energy = hours * assumed.watts * assumed.pue / 1e6
    carbon = energy * assumed.carbon_intensity
    return Account(
        flops=hours * hourly * utilisation if flops is None else flops,
        gpu_hours=hours,
        utilisation=utilisation,
        utilisation_assumed=guessed,
        energy_mwh=energy,
        carbon_tonnes=carbon,
        people_years=carbon / assumed.person,
        trees=carbon / assumed.tree,
        price=_price(hours, assumed),
        point_saves=_point_saves(hours, utilisation, assumed),
    )


def _point_saves(hours: float, utilisation: float, assumed: Assumptions) -> PointSaves:
    of_point = hours * (1 - utilisation / (utilisation + PERCENT))  # FLOPs stay: hours fall as utilisation rises
    savings = (Saving(gpu_hours=saved, price=_price(saved, assumed)) for saved in (of_point, PERCENT * hours))
    return PointSaves(percentage_point=next(savings), one_percent=next(savings))


def _price(hours: float, assumed: Assumptions) -> float | None:
    return None if assumed.price_per_hour is None else hours * assumed.price_per_hour


def _positive(name: str, value: float) -> None:
    if not (isfinite(value) and value > 0):
        raise ConfigError(f"{name} is a number above 0, not {value}")

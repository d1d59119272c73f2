"""Accelerators as data: peak, bandwidth, memory and power, read from `accelerators.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from luban.core.config import from_dict
from luban.core.errors import ConfigError, nearest

TABLE = Path(__file__).with_name("accelerators.toml")
# fractions of peak and bandwidth that a large matmul and a copy reach on an H100 SXM, for rows without a measurement
MATMUL_FRACTION, COPY_FRACTION = 0.79, 0.90


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A row of the table, in the units of the table."""

    names: list[str]  # as torch.cuda.get_device_name() says
    source: str  # who states it
    peak: dict[str, float]  # TFLOP/s of dense matmuls by dtype
    memory: float  # GB (10⁹ bytes)
    bandwidth: float  # TB/s
    power: float  # W
    link: float = 0.0  # GB/s to its neighbours, both directions together
    # "bf16": TFLOP/s of a large matmul; "bandwidth": TB/s of a copy
    measured: dict[str, float] = field(default_factory=dict)

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of dense matmuls under `train.precision`. Raises ConfigError for one that it doesn't have."""
        kind = {"fp32": "tf32", "fp16": "bf16"}.get(precision, precision)
        if kind not in self.peak:
            raise ConfigError(f"{self.names[0]} has no {precision} matmuls; it has {', '.join(self.peak)}")
        return 1e12 * self.peak[kind]

    def matmul_flops(self, precision: str) -> float:
        """FLOP/s that one large matmul reaches: the measured fraction of the peak."""
        fraction = self.measured["bf16"] / self.peak["bf16"] if "bf16" in self.measured else MATMUL_FRACTION
        return fraction * self.peak_flops(precision)

    @property
    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes."""
        return 1e12 * self.measured.get("bandwidth", COPY_FRACTION * self.bandwidth)


@cache
def accelerators() -> dict[str, Accelerator]:
    """All rows."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: from_dict(Accelerator, row, name) for name, row in rows.items()}


def accelerator(name: str) -> Accelerator:
    """A row by its own name ("h100-sxm"). Raises ConfigError, with the nearest, where there is none."""
    if name not in accelerators():
        raise ConfigError(f"unknown accelerator '{name}'{nearest(name, accelerators())}")
    return accelerators()[name]


def accelerator_of(device_name: str) -> Accelerator | None:
    """The row whose names include what `torch.cuda.get_device_name()` says, exactly: a laptop GPU with a similar name is
    another chip."""
    wanted = device_name.strip().casefold()
    return next((row for row in accelerators().values() if wanted in (n.casefold() for n in row.names)), None)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device of a run, as far as predictions and reports need it."""

    name: str  # as torch gives it
    accelerator: Accelerator | None  # its row of the table; None: a CPU, or a GPU that isn't in the table

    def peak_flops(self, precision: str) -> float | None:
        """FLOP/s that utilisation refers to; for fp8 those of bf16, so that one model has one scale."""
        row = self.accelerator
        return None if row is None else row.peak_flops("bf16" if precision == "fp8" else precision)

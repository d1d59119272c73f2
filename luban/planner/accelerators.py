"""What is known of an accelerator: its row of `accelerators.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from luban.core.config import from_dict
from luban.core.errors import ConfigError, nearest

TABLE = Path(__file__).with_name("accelerators.toml")
PRODUCT_SHARE, COPY_SHARE = 0.79, 0.90  # of peak and bandwidth, measured on an H100 SXM; where a row has no measurement


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A row of the table, in the units of the table."""

    names: list[str]  # as torch.cuda.get_device_name() says
    source: str  # who states it
    peak: dict[str, float]  # TFLOP/s of dense matrix products by precision
    memory: float  # GB (10⁹ bytes)
    bandwidth: float  # TB/s
    power: float  # W
    link: float = 0.0  # GB/s to its neighbours, both directions together
    measured: dict[str, float] = field(default_factory=dict)  # TFLOP/s of a product, TB/s of a copy

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of dense products under `train.precision`. Raises ConfigError for one that it doesn't have."""
        kind = {"fp32": "tf32", "fp16": "bf16"}.get(precision, precision)
        if kind not in self.peak:
            raise ConfigError(f"{self.names[0]} has no {precision} products; it has {', '.join(self.peak)}")
        return 1e12 * self.peak[kind]

    def product_flops(self, precision: str) -> float:
        """FLOP/s that one large product reaches: the measured share of the peak."""
        share = self.measured["bf16"] / self.peak["bf16"] if "bf16" in self.measured else PRODUCT_SHARE
        return share * self.peak_flops(precision)

    @property
    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes."""
        return 1e12 * self.measured.get("bandwidth", COPY_SHARE * self.bandwidth)


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
    """The row for what `torch.cuda.get_device_name()` says, compared whole: a laptop's chip of a like name is another."""
    wanted = device_name.strip().casefold()
    return next((row for row in accelerators().values() if wanted in (n.casefold() for n in row.names)), None)

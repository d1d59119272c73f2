"""How fast an accelerator is by the size of the work: tables measured by `luban bench machine`, or those that ship.

A matmul of (m × k) by (k × n) reaches `matmul` at size ∛(m·n·k), times `thin` at the least of m, n and k, of the peak of the
accelerator's row. Between two rows of a table the share is interpolated over the logarithm of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from pathlib import Path

from luban.core.config import from_dict, read_toml
from luban.core.errors import ConfigError
from luban.planner.accelerators import Accelerator, accelerator

SHIPPED = Path(__file__).with_name("machines")
SCORE_BYTES = 2  # of a number among attention's scores


@dataclass(frozen=True, kw_only=True)
class MachineTable:
    """Measured or estimated speeds of one accelerator, with the software that runs on it."""

    gpu: str  # row of accelerators.toml
    source: str  # where the figures come from, and how sure they are
    matmul: tuple[tuple[float, float], ...]  # (∛(m·n·k), share of the bf16 peak), by size
    thin: tuple[tuple[float, float], ...] = ((1, 1.0),)  # (least of m, n, k, further factor), by size
    attention_forward: tuple[tuple[float, float], ...] = ()  # (head dim, TFLOP/s); none: scores are written to memory
    attention_backward: tuple[tuple[float, float], ...] = ()  # likewise
    score_passes: tuple[float, float] = (
        6.0,
        10.0,
    )  # reads and writes of each score, forward and backward, where written
    copy: float = 0.0  # TB/s read and written; 0: the accelerator's
    launch_us: float = 0.0  # a kernel, where launching isn't hidden behind the work
    elementwise: float = 1.0  # reads and writes of element-wise operations relative to Luban's compiled step
    sequence_parallel: bool = True  # the axis tensor also divides the tokens of norms and residuals
    links: float = 0.8  # share of a link's bandwidth that collectives reach inside a node
    network: float = 0.8  # the same between nodes
    overlap: float = 0.5  # share of FSDP's messages that is hidden behind computation
    error: float = 0.2  # relative error of predictions by this table, where no runs say it

    def __post_init__(self) -> None:
        for name in ("matmul", "thin", "attention_forward", "attention_backward"):
            rows = getattr(self, name)
            if any(len(row) != 2 or min(row) <= 0 for row in rows) or [r[0] for r in rows] != sorted(
                {r[0] for r in rows}
            ):
                raise ConfigError(f"{name} is a table of (size, value) above 0 with ascending sizes")
        if not self.matmul:
            raise ConfigError("matmul needs at least one row of (size, share of the peak)")
        for name in ("links", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share above 0 and up to 1, not {getattr(self, name)}")

    @property
    def row(self) -> Accelerator:
        """The accelerator's row."""
        return accelerator(self.gpu)

    @property
    def copy_rate(self) -> float:
        """Bytes a second that are read and written."""
        return 1e12 * self.copy if self.copy else self.row.copy_rate

    def matmul_rate(self, m: float, n: float, k: float, precision: str = "bf16") -> float:
        """FLOP/s of one matmul."""
        share = interpolated(self.matmul, (m * n * k) ** (1 / 3)) * interpolated(self.thin, min(m, n, k))
        return share * self.row.peak_flops("bf16" if precision == "fp8" else precision)

    def matmul_seconds(self, m: float, n: float, k: float, precision: str = "bf16") -> float:
        """Seconds of one matmul, its launch included."""
        return 2 * m * n * k / self.matmul_rate(m, n, k, precision) + 1e-6 * self.launch_us

    def attention_seconds(self, flops: float, scores: float, head_dim: int) -> tuple[float, float]:
        """Seconds forward and backward.

        Args:
            flops: of the forward pass, of what the mask leaves.
            scores: number of scores, those behind the mask included.
        """
        if self.attention_forward:
            forward = 1e12 * interpolated(self.attention_forward, head_dim)
            backward = 1e12 * interpolated(self.attention_backward or self.attention_forward, head_dim)
            return flops / forward, 2.5 * flops / backward
        square = 4 * scores * head_dim  # what matmuls over the whole square cost
        rate = self.matmul_rate(2048, 2048, head_dim)
        moved = [SCORE_BYTES * passes * scores / self.copy_rate for passes in self.score_passes]
        return square / rate + moved[0], 2 * square / rate + moved[1]


def interpolated(rows: Sequence[tuple[float, float]], size: float) -> float:
    """The value at a size, over its logarithm; outside of the table that of its nearest row."""
    if size <= rows[0][0]:
        return rows[0][1]
    for (low, a), (high, b) in pairwise(rows):
        if size <= high:
            at = log2(size / low) / log2(high / low)
            return a + at * (b - a)
    return rows[-1][1]


def machine_table(name: str) -> MachineTable:
    """A file that `luban bench machine` wrote, or the shipped table of an accelerator; for one without a table the H100's shares.

    Raises:
        ConfigError: the file can't be read or isn't such a table, or the accelerator is unknown.
    """
    path = SHIPPED / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
    elif not path.is_file():
        accelerator(name)  # raises where it is unknown
        path = SHIPPED / f"{_family(name)}.toml"
        table = _read(path)
        return MachineTable(
            **{
                **vars(table),
                "gpu": name,
                "copy": 0.0,
                "attention_forward": _scaled(table.attention_forward, name, table.gpu),
                "attention_backward": _scaled(table.attention_backward, name, table.gpu),
                "source": f"no table of {name}: shares of the peak of {table.gpu}; {table.source}",
            }
        )
    return _read(path)


def _family(name: str) -> str:
    return next((known for known in ("a100-80gb", "v100-32gb") if name.startswith(known[:4])), "h100-sxm")


def _scaled(rows: Sequence[tuple[float, float]], to: str, of: str) -> tuple[tuple[float, float], ...]:
    factor = accelerator(to).peak["bf16"] / accelerator(of).peak["bf16"]
    return tuple((size, value * factor) for size, value in rows)


def _read(path: Path) -> MachineTable:
    return from_dict(MachineTable, read_toml(path), str(path))

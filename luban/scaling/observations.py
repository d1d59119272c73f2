"""Finished runs as parameters, tokens and loss, read from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luban.core.errors import DataError

# what a column may be called, in lower case with spaces for underscores
NAMES = {
    "parameters": ("parameters", "params", "n", "model size"),
    "tokens": ("tokens", "d", "training tokens", "dataset size"),
    "flops": ("flops", "flop", "c", "compute", "training flop", "training flops"),
    "loss": ("loss", "l", "final loss", "validation loss"),
}
FLOPS_PER_TOKEN = 6  # and parameter: C = 6·N·D


@dataclass(frozen=True)
class Observations:
    """Runs. All arrays: float64, shape (runs,)."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray  # nats a token
    lines: np.ndarray  # of the file, int

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, kept: np.ndarray) -> Observations:
        """The runs of an index or mask."""
        return Observations(self.parameters[kept], self.tokens[kept], self.loss[kept], self.lines[kept])

    @property
    def flops(self) -> np.ndarray:
        """6·N·D."""
        return FLOPS_PER_TOKEN * self.parameters * self.tokens


def read_observations(path: Path) -> Observations:
    """Runs of a CSV file with a loss and two of parameters, tokens and FLOPs; the third follows from C = 6·N·D.

    Raises:
        DataError: a column is missing, or a value is no number above 0, with its line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = _columns(path, reader.fieldnames or ())
            rows = [(reader.line_num, *(_number(path, reader.line_num, row, c) for c in columns)) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise DataError(f"{path}: no runs below the header")
    lines, parameters, tokens, flops, loss = np.array(rows, dtype=np.float64).T
    if columns[0] is None:
        parameters = flops / (FLOPS_PER_TOKEN * tokens)
    if columns[1] is None:
        tokens = flops / (FLOPS_PER_TOKEN * parameters)
    return Observations(parameters, tokens, loss, lines.astype(np.int64))


def _columns(path: Path, header: Sequence[str]) -> list[str | None]:
    """The file's names of parameters, tokens, FLOPs and loss; None: it lacks this one and doesn't need it."""
    known = {name.strip().lower().replace("_", " "): name for name in header}
    found = {what: next((known[n] for n in names if n in known), None) for what, names in NAMES.items()}
    sizes = [found[what] for what in ("parameters", "tokens", "flops")]
    if found["loss"] is None or sum(size is not None for size in sizes) < 2:
        raise DataError(
            f"{path}: needs a column loss and two of parameters, tokens and flops (also N, D, C); "
            f"it has {', '.join(header) or 'none'}"
        )
    if sizes[0] is not None and sizes[1] is not None:
        sizes[2] = None
    return [*sizes, found["loss"]]


def _number(path: Path, line: int, row: dict[str, str | None], column: str | None) -> float:
    if column is None:
        return 1.0  # computed from the other two
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise DataError(f"{path}, line {line}: {column} is {text!r}, not a number above 0")
    return value

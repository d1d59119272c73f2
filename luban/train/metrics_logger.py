"""Metrics of a run: metrics.jsonl always, TensorBoard when asked for."""

from __future__ import annotations

from pathlib import Path

from luban.core.errors import MissingExtra
from luban.core.log import Metrics


class MetricsLogger:
    """Rows of numbers by step. Opening it at a step drops what a lost session wrote past that step."""

    def __init__(self, run: Path, step: int, *, tensorboard: bool):
        self.metrics = Metrics(run / "metrics.jsonl", keep_until=step)
        self.board = _summary_writer(run / "tensorboard", step) if tensorboard else None

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_) -> None:
        self.metrics.close()
        if self.board:
            self.board.close()

    def write(self, *, step: int, **row: float) -> None:
        """One row, in every place."""
        self.metrics.write(step=step, **row)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)


class NoMetrics:
    """In the place of a MetricsLogger in processes that write nothing."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_) -> None:
        pass

    def write(self, *, step: int, **row: float) -> None:
        """Nothing."""


def open_metrics(run: Path, step: int, tensorboard: bool, writes: bool) -> MetricsLogger | NoMetrics:
    """The metrics of a run, for a process that writes them or one that doesn't."""
    return MetricsLogger(run, step, tensorboard=tensorboard) if writes else NoMetrics()


def require_tensorboard() -> None:
    """Raise MissingExtra where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard", "--train.tensorboard true") from None


def _summary_writer(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)

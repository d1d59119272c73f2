"""Batches whose rows are of several tasks, sampled by their shares.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.packing import Packing

COUNTED = 64  # rows of a task whose targets are counted for its factor, at most
ROUTER = "router_"  # arrays that the trainer adds to a batch, one entry for each of its rows


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task's rows of a split.

    Args:
        share: of the sampled rows, before it is rounded to whole rows of an epoch.
        factor: on its loss.
    """

    name: str
    packing: Packing
    share: float
    factor: float = 1.0


class TaskRows(NamedTuple):
    """The rows of a batch that are one task's."""

    name: str
    batch: Batch
    places: np.ndarray  # (rows of the task,) int64, rising: their rows in the whole batch
    factor: float


@dataclass(frozen=True, kw_only=True)
class MultitaskBatch(Batch):
    """The rows of several tasks. The loss reads each task's arrays as `task/array`; the batch's own hold one-sided inputs of all
    rows, for counts and routers."""

    tasks: tuple[TaskRows, ...]  # those that have rows here

    def arrays(self) -> dict[str, np.ndarray]:
        """The loss module's inputs by name."""
        found = {}
        for task in self.tasks:
            found |= {f"{task.name}/{name}": array for name, array in task.batch.arrays().items()}
            found[f"{task.name}/factor"] = np.full(len(task.places), task.factor)
        return found

    def cut(self, tensors: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
        """Each piece has the next B / pieces rows, and of every task those that are among them."""
        size, found = len(self.tokens) // pieces, []
        for piece in range(pieces):
            begin, cut = piece * size, {}
            for task in self.tasks:
                first, last = np.searchsorted(task.places, (begin, begin + size)).tolist()
                if first == last:
                    continue
                for name, tensor in tensors.items():
                    if name.startswith(f"{task.name}/"):
                        cut[name] = tensor[first:last]
                    elif name.startswith(ROUTER):
                        cut[f"{task.name}/{name}"] = tensor[task.places[first:last].tolist()]
            found.append(cut)
        return found

    @property
    def tokens_read(self) -> int:
        """Of all tasks."""
        return sum(task.batch.tokens_read for task in self.tasks)

    @property
    def target_count(self) -> int:
        """Of all tasks."""
        return sum(task.batch.target_count for task in self.tasks)


class MultitaskRows:
    """Rows of several tasks. An epoch has as many rows as all tasks together, of which each task has its share.

    The rows that a task adds to epoch e are its next ones: it goes through its own rows epoch after epoch, in another order each
    time. The trainer's loader shuffles the epoch.

    Args:
        tasks: at least one; shares are relative.
        average: rows: a row counts the same in the loss whatever its task's number of targets, which is evened out by the mean
            number of targets of a task's rows; targets: every target counts the same.
        seed: of the order of a task's rows.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int, average: str):
        self.rows, self.seed = sum(task.packing.rows for task in tasks), seed
        self.quotas = divide(self.rows, [task.share for task in tasks])
        self.begins = np.concatenate([[0], np.cumsum(self.quotas)])
        shares = self.quotas / self.rows
        counts = np.ones(len(tasks))
        if average == "rows":
            counts = np.array([_targets_per_row(task.packing) for task in tasks])
        self.factors = (shares @ counts) / counts * [task.factor for task in tasks]
        self.tasks = {task.name: (float(share), task.packing) for task, share in zip(tasks, shares, strict=True)}
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> MultitaskBatch:
        """The batch of these rows. Padding goes to the task of the row before it."""
        rows = np.asarray(rows)
        epochs = np.zeros_like(rows) if epochs is None else np.asarray(epochs)
        owners = np.searchsorted(self.begins, rows, side="right") - 1
        for place in np.flatnonzero(rows < 0):
            owners[place] = owners[place - 1] if place else 0
        found = []
        for number, (name, (_, packing)) in enumerate(self.tasks.items()):
            places = np.flatnonzero(owners == number)
            if len(places):
                own, passes = self._own_rows(number, name, packing.rows, rows[places], epochs[places])
                found.append(TaskRows(name, packing.gather(own, passes), places, float(self.factors[number])))
        return whole_batch(found)

    def alone(self) -> dict[str, tuple[float, Packing]]:
        """Of each task its share and its rows alone, as batches that the multitask loss reads, with factor 1."""
        return {name: (share, _OneTask(name, packing)) for name, (share, packing) in self.tasks.items()}

    def _own_rows(
        self, number: int, name: str, size: int, rows: np.ndarray, epochs: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The task's row numbers, and the passes over its data that they are in."""
        quota = self.quotas[number]
        passes, places = np.divmod(epochs * quota + rows - self.begins[number], size)
        if quota != size:  # otherwise an epoch is one pass over the task, which the loader has shuffled
            for each in np.unique(passes[rows >= 0]).tolist():
                here = passes == each
                places[here] = self._order(name, each, size)[places[here]]
        return np.where(rows < 0, -1, places), np.where(rows < 0, 0, passes)

    def _order(self, name: str, epoch: int, size: int) -> np.ndarray:
        order = self._orders.get((name, epoch))
        if order is None:
            order = generator(self.seed, "task", name, "epoch", epoch).permutation(size)
            kept = {key: value for key, value in self._orders.items() if key[0] != name or key[1] >= epoch - 1}
            self._orders = {**kept, (name, epoch): order}  # a new dict, since the loader's threads read the old one
        return order


class _OneTask:
    def __init__(self, name: str, packing: Packing):
        self.name, self.packing, self.rows = name, packing, packing.rows

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> MultitaskBatch:
        """The batch of these rows of the task."""
        return whole_batch([TaskRows(self.name, self.packing.gather(rows, epochs), np.arange(len(rows)), 1.0)])


def whole_batch(tasks: Sequence[TaskRows]) -> MultitaskBatch:
    """One batch of the tasks' rows, whose own arrays are as wide as the widest task's."""
    rows, width = sum(len(task.places) for task in tasks), max(task.batch.tokens.shape[1] for task in tasks)

    def joined(name: str, fill: int) -> np.ndarray:
        out = np.full((rows, width), fill, dtype=getattr(tasks[0].batch, name).dtype)
        for task in tasks:
            array = getattr(task.batch, name)
            out[task.places, : array.shape[-1]] = array if array.ndim == 2 else array[:, 0]
        return out

    return MultitaskBatch(
        tokens=joined("tokens", 0),
        targets=joined("targets", 0),
        loss_mask=joined("loss_mask", 0),
        documents=joined("documents", -1),
        positions=joined("positions", 0),
        tasks=tuple(tasks),
    )


def divide(total: int, shares: Sequence[float]) -> np.ndarray:
    """Whole numbers that sum to `total`, at least 1 each, in proportion to `shares`: largest remainders first."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    found = np.maximum(np.floor(exact + 1e-9).astype(np.int64), 1)
    while (short := total - found.sum()) != 0:
        remainder = exact - found
        if short > 0:
            found[np.argsort(-remainder, kind="stable")[:short]] += 1
        else:
            found[np.argmin(np.where(found > 1, remainder, np.inf))] -= 1
    return found


def mixing_shares(sizes: Sequence[int], *, limit: int = 0, temperature: float = 1.0) -> list[float]:
    """Shares in proportion to min(size, limit)^(1/temperature) (Raffel et al. 2020, section 3.5.2).

    Args:
        sizes: rows of each task.
        limit: of a size (0: none).
        temperature: 1: in proportion; the higher, the more even.
    """
    weights = [float(min(size, limit) if limit else size) ** (1 / temperature) for size in sizes]
    return [weight / sum(weights) for weight in weights]


def _targets_per_row(packing: Packing) -> float:
    """Mean number of targets of a row, over rows spread evenly over the split."""
    taken = min(packing.rows, COUNTED)
    rows = np.arange(taken) * packing.rows // taken
    return max(float(packing.gather(rows, np.zeros_like(rows)).target_count), 1.0) / taken

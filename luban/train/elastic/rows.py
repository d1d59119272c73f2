"""Which worker trains on which rows of every step's batch, each row exactly once.

The batch of a step is a pure function of the seed (`luban.data.loader`); here its rows are handed out. A step's row in the
table is its only record: it is written when the first worker asks for the step, and deleted when the run goes back before it,
because its update was lost with a worker. What remains at the end is what the final weights were trained on.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from luban.train.elastic.database import Events, transaction
from luban.train.elastic.membership import Membership
from luban.train.elastic.shares import bounds_by_speed, equal_bounds, smoothed
from luban.train.elastic.wire import Refused

BEGINS, RESUMED = "stretches begin", "resumed"  # names of facts


@dataclass
class Rows:
    """The rows of a run's batches.

    Args:
        balance: divide by the speed of each worker; else evenly.
    """

    database: sqlite3.Connection
    membership: Membership
    events: Events
    balance: bool = False
    speeds: dict[int, float] = field(default_factory=dict)  # rank → rows a second, of this generation

    def resume(self, generation: int, step: int) -> int:
        """The generation goes on with the batch of this step: later ones were lost and are used anew. Returns their number. Said once
        in a generation; a request that arrives again changes nothing and has the same answer.

        Where the run has been trained without the service in between, a new stretch of steps begins here.
        """
        self.membership.require(generation)
        facts = self.membership.facts
        known = facts.get(RESUMED, {})
        if known.get("generation") == generation:
            return known["undone"]
        with transaction(self.database):
            undone = self.database.execute("DELETE FROM steps WHERE step >= ?", (step,)).rowcount
            if undone:
                self.events.add("steps lost", "", steps=undone, going_on_from=step)
            last = self.last()
            begins = [begin for begin in self._begins() if begin < step]
            if last is not None and step > last + 1:
                begins.append(step)
            facts.set(**{BEGINS: begins, RESUMED: {"generation": generation, "undone": undone}})
        self.speeds = {}
        return undone

    def lease(self, generation: int, step: int, rows: int, pieces: int) -> dict[str, Any]:
        """The division of a step's batch, the same for every worker that asks.

        Args:
            rows: of a micro-batch.
            pieces: micro-batches.

        Returns:
            {"bounds": [...]}: rank r trains on rows bounds[r] to bounds[r + 1] of every micro-batch; or {"change": True}: the
            membership changes before this step.

        Raises:
            StaleGeneration: of an earlier generation.
            Refused: a step between is missing.
        """
        self.membership.require(generation)
        found = self.database.execute("SELECT * FROM steps WHERE step = ?", (step,)).fetchone()
        if found is not None:
            if found["generation"] != generation:
                raise Refused(f"step {step} was trained by generation {found['generation']}")
            return {"bounds": json.loads(found["bounds"])}
        if self.membership.facts.get("change", False):
            return {"change": True}
        last = self.last()
        begins = last is not None and last < step and step in self._begins()
        if last is not None and step != last + 1 and not begins:
            raise Refused(f"step {step} was asked for, and the last one was {last}")
        workers = len(self.membership.members())
        bounds = bounds_by_speed(rows, self.speeds, workers) if self.balance else equal_bounds(rows, workers)
        row = (step, generation, pieces, json.dumps(bounds), "[]")
        self.database.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", row)
        return {"bounds": bounds}

    def trained(self, generation: int, steps: int) -> None:
        """The run has ended after so many steps: what loaders have asked for beyond them was not used."""
        self.membership.require(generation)
        self.database.execute("DELETE FROM steps WHERE step >= ?", (steps,))

    def done(self, generation: int, step: int, rank: int, seconds: float) -> bool:
        """A worker has finished a step and keeps its result in memory. Returns whether that is news.

        Args:
            seconds: that it computed, without waiting for others.
        """
        self.membership.require(generation)
        row = self.database.execute("SELECT * FROM steps WHERE step = ?", (step,)).fetchone()
        if row is None or row["generation"] != generation:
            raise Refused(f"step {step} was not handed out to generation {generation}")
        ranks = json.loads(row["done"])
        if rank in ranks:
            return False
        done = json.dumps(sorted([*ranks, rank]))
        self.database.execute("UPDATE steps SET done = ? WHERE step = ?", (done, step))
        bounds = json.loads(row["bounds"])
        trained = (bounds[rank + 1] - bounds[rank]) * row["pieces"]
        self.speeds[rank] = smoothed(self.speeds.get(rank), trained / max(seconds, 1e-9))
        return True

    def _begins(self) -> list[int]:
        """The first steps of stretches after the first one."""
        return self.membership.facts.get(BEGINS, [])

    def last(self) -> int | None:
        """The last step that was handed out."""
        return self.database.execute("SELECT MAX(step) AS last FROM steps").fetchone()["last"]

    def audit(self) -> dict[str, Any]:
        """{"first", "steps", "rows", "wrong"}: how many steps and rows were used, and steps of which some row was used twice
        or never, or that are missing in between, except before a stretch that begins after training without the service."""
        used, rows, wrong, before = 0, 0, [], None
        first, begins = None, self._begins()
        for row in self.database.execute("SELECT * FROM steps ORDER BY step"):
            bounds = json.loads(row["bounds"])
            first = row["step"] if first is None else first
            gap = before is not None and row["step"] != before + 1 and row["step"] not in begins
            if gap or bounds[0] != 0 or any(low >= high for low, high in pairwise(bounds)):
                wrong.append(row["step"])
            before, used, rows = row["step"], used + 1, rows + bounds[-1] * row["pieces"]
        return {"first": first, "steps": used, "rows": rows, "wrong": wrong}

"""The seconds of all workers of a run, by kind, with the time in which a lost worker had no successor."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from luban.train.elastic.database import Facts
from luban.train.goodput import KINDS, added


class Accounts:
    """Ledgers of workers: of each process that worked under a worker's name."""

    def __init__(self, database: sqlite3.Connection, wall: Callable[[], float]):
        self.database, self.wall, self.facts = database, wall, Facts(database)

    def begin_session(self) -> None:
        """Nobody has worked for the run since the last report: the time until now is no time of the run."""
        self.facts.set(earlier=self.total())
        self.database.execute("DELETE FROM ledgers")

    def forget(self) -> None:
        """All that was reported so far is of another run."""
        self.facts.set(earlier={}, told={})
        self.database.execute("DELETE FROM ledgers")

    def known(self, worker: str, incarnation: str) -> bool:
        """Whether another process has worked under this name before."""
        query = "SELECT 1 FROM ledgers WHERE worker = ? AND incarnation != ?"
        return self.database.execute(query, (worker, incarnation)).fetchone() is not None

    def report(self, incarnation: str, worker: str, seconds: Mapping[str, float]) -> None:
        """What a process has spent since it started, by kind."""
        now = self.wall()
        row = (incarnation, worker, now - sum(seconds.values()), now, json.dumps(dict(seconds)))
        self.database.execute("INSERT OR REPLACE INTO ledgers VALUES (?, ?, ?, ?, ?)", row)

    def told(self) -> dict[str, Any]:
        """The total, as it may be written into the run's manifest."""
        found = self.total()
        self.facts.set(told=found)
        return found

    def add_plain(self, recorded: Mapping[str, float]) -> None:
        """What the manifest holds beyond what it was told was spent while the run was trained without the service."""
        told, earlier = self.facts.get("told", {}), self.facts.get("earlier", {})
        more = {kind: max(recorded.get(kind, 0.0) - told.get(kind, 0.0), 0.0) for kind in KINDS}
        if any(more.values()):
            wall = earlier.get("wall", 0.0) + sum(more.values())
            known = {kind: told.get(kind, 0.0) + more[kind] for kind in KINDS}
            self.facts.set(earlier={**added(earlier, more), "wall": wall}, told=known)

    def total(self) -> dict[str, Any]:
        """Seconds of all workers by kind; "wall": the sum of the wall-clock time of each from its first start to its last
        report, which the kinds add up to. Time between the last report of a lost process and the start of the next is lost."""
        earlier = self.facts.get("earlier", {})
        found, wall = added(earlier), earlier.get("wall", 0.0)
        until: dict[str, float] = {}
        for row in self.database.execute("SELECT * FROM ledgers ORDER BY worker, began"):
            seconds = json.loads(row["seconds"])
            for kind in KINDS:
                found[kind] += seconds.get(kind, 0.0)
            wall += sum(seconds.values())
            before = until.get(row["worker"])
            if before is not None:
                gap = max(row["began"] - before, 0.0)
                found["lost"], wall = found["lost"] + gap, wall + gap
            until[row["worker"]] = row["until"]
        return {**found, "wall": wall}

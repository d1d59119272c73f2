"""Who takes part in a run: generations of workers, each with its ranks.

A generation begins when all expected workers have asked for a rank, or when those that have waited long enough are enough.
It ends when a member is lost or asks for a rank again. Members keep their ranks from generation to generation, so that a
replacement gets the rank of the one it replaces, and the sums of a step are added up in the same order.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luban.core.resuming import differences
from luban.train.elastic.database import Events, Facts, transaction
from luban.train.elastic.wire import Refused, StaleGeneration

MOST_NAMED = 5  # fields that differ, in the refusal of a worker
RECIPE = "recipe."  # what their paths begin with; else they are versions of code
REMEDIES = "with the same recipe", "from the same code and torch"


@dataclass
class Membership:
    """The workers of a run.

    Args:
        usable: number of workers → how many of them a plan can use.
        fewest: with fewer no generation begins.
        patience: seconds that workers wait for those missing.
        clock: monotonic seconds.
    """

    database: sqlite3.Connection
    events: Events
    usable: Callable[[int], int]
    fewest: int = 1
    patience: float = 60.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        self.facts = Facts(self.database)
        # also after a restart: nobody has waited for this process yet
        self.forming_since = self.newcomer_since = self.clock()

    @property
    def generation(self) -> int:
        """Number of the present or last generation; 0 before the first."""
        return self.facts.get("generation", 0)

    @property
    def running(self) -> bool:
        """Whether a generation is at work; else the next one is being formed."""
        return self.facts.get("running", False)

    def workers(self) -> list[dict[str, Any]]:
        """All that are known, by node and number."""
        rows = [dict(row) for row in self.database.execute("SELECT * FROM workers")]
        return sorted(rows, key=lambda row: (row["node"], int(row["name"].rpartition("/")[2])))

    def members(self) -> list[dict[str, Any]]:
        """Those of the present generation, by rank."""
        found = [row for row in self.workers() if self.running and not row["waiting"] and row["rank"] is not None]
        return sorted(found, key=lambda row: row["rank"])

    def forget(self) -> None:
        """Nobody takes part any more, and any version may."""
        self.forming_since = self.clock()
        self.database.execute("DELETE FROM workers")
        self.database.execute("DELETE FROM nodes")
        self.facts.set(running=False, change=False, version=None)

    def node(self, name: str, numbers: list[int]) -> None:
        """A machine takes part with workers of these numbers; none: it leaves."""
        row = self.database.execute("SELECT numbers FROM nodes WHERE name = ?", (name,)).fetchone()
        if row is not None and json.loads(row["numbers"]) == numbers:
            return
        self.database.execute("INSERT OR REPLACE INTO nodes VALUES (?, ?)", (name, json.dumps(numbers)))
        self.events.add("node joins" if numbers else "node leaves", name, workers=len(numbers))
        if self.running and {member["name"] for member in self.members()} - self.expected():
            self.facts.set(change=True)

    def expected(self) -> set[str]:
        """Names of the workers that the nodes should have."""
        rows = self.database.execute("SELECT * FROM nodes")
        return {f"{row['name']}/{number}" for row in rows for number in json.loads(row["numbers"])}

    def join(self, name: str, incarnation: str, version: Mapping[str, Any], after: int, pid: int, started: str) -> None:
        """Ask for a rank in the next generation.

        Args:
            incarnation: identifies the process.
            version: of its code, libraries and recipe, which all must share, as plain data.
            after: the last generation that the process was part of; 0: none.

        Raises:
            Refused: the worker's version is another than the run's.
        """
        wanted = self.facts.get("version")
        if wanted is None:
            self.facts.set(version=version)
        elif found := list(differences(wanted, json.loads(json.dumps(version)))):
            text, remedy = _said(found)
            self.events.add_once("refused", name, differences=text, incarnation=incarnation)
            raise Refused(f"worker {name} is refused, since it has {text}: start it {remedy}")
        known = self.database.execute("SELECT * FROM workers WHERE name = ?", (name,)).fetchone()
        rank = None if known is None else known["rank"]
        same = known is not None and known["incarnation"] == incarnation
        placed = known is not None and same and not known["waiting"] and rank is not None and self.running
        if placed and self.generation > after:
            return  # the answer to an earlier request was lost
        if self.running and known is not None and not known["waiting"] and rank is not None:
            self.end_generation(name, "asks for a rank again" if same else "was replaced")
        row = (name, name.rpartition("/")[0], incarnation, pid, started, 1, rank)
        self.database.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self.newcomer_since = self.clock()
        self.take_newcomers()
        self.try_to_form()

    def assignment(self, name: str, incarnation: str, after: int) -> dict[str, Any] | None:
        """The rank of a worker in a generation later than `after`; None: not yet."""
        self.take_newcomers()
        self.try_to_form()
        if name not in self.expected():
            return {"released": True}
        for row in self.members():
            if row["name"] == name and row["incarnation"] == incarnation and self.generation > after:
                names = [member["name"] for member in self.members()]
                return {"generation": self.generation, "rank": row["rank"], "workers": names}
        return None

    def lost(self, name: str, incarnation: str, how: str) -> None:
        """A worker's process has ended without being asked to."""
        row = self.database.execute(
            "SELECT * FROM workers WHERE name = ? AND incarnation = ?", (name, incarnation)
        ).fetchone()
        if row is None or (row["waiting"] == 0 and row["pid"] == 0):
            return
        member = self.running and not row["waiting"] and row["rank"] is not None
        with transaction(self.database):
            self.database.execute("UPDATE workers SET waiting = 0, pid = 0 WHERE name = ?", (name,))
            self.events.add("lost", name, how=how)
            if member:
                self.end_generation(name, how)

    def end_generation(self, who: str, why: str) -> None:
        """Members must ask for ranks in the next one."""
        self.forming_since = self.clock()
        self.facts.set(running=False, change=False)
        self.events.add("generation ends", who, why=why, generation=self.generation)

    def require(self, generation: int) -> None:
        """Raise StaleGeneration unless the generation is at work."""
        if not self.running or generation != self.generation:
            raise StaleGeneration(f"generation {generation} is over")

    def take_newcomers(self) -> None:
        """Let the members leave at the next step that nobody has begun, if workers wait that a plan can use; not before all
        expected ones do, or they have waited long enough."""
        if not self.running:
            return
        members, waiting = self.members(), self.waiting()
        missing = self.expected() - {row["name"] for row in (*members, *waiting)}
        patient = bool(missing) and self.clock() - self.newcomer_since < self.patience
        if waiting and not patient and self.usable(len(members) + len(waiting)) > len(members):
            self.facts.set(change=True)

    def try_to_form(self) -> bool:
        """Begin the next generation if enough workers wait for it."""
        if self.running:
            return False
        waiting = self.waiting()
        missing = self.expected() - {row["name"] for row in waiting}
        if missing and self.clock() - self.forming_since < self.patience:
            return False
        size = self.usable(len(waiting)) if waiting else 0
        if size < max(self.fewest, 1):
            return False
        self._form(waiting, size)
        return True

    def waiting(self) -> list[dict[str, Any]]:
        """Expected workers that have asked for a rank."""
        expected = self.expected()
        return [row for row in self.workers() if row["waiting"] and row["name"] in expected]

    def _form(self, waiting: list[dict[str, Any]], size: int) -> None:
        ranks: dict[str, int] = {}
        for row in sorted(waiting, key=lambda row: row["rank"] is None):
            if row["rank"] is not None and row["rank"] < size and row["rank"] not in ranks.values():
                ranks[row["name"]] = row["rank"]
        free = iter(sorted(set(range(size)) - set(ranks.values())))
        for row in waiting:
            if row["name"] not in ranks and (rank := next(free, None)) is not None:
                ranks[row["name"]] = rank
        with transaction(self.database):
            self.database.execute("UPDATE workers SET rank = NULL")
            for name, rank in ranks.items():
                self.database.execute("UPDATE workers SET rank = ?, waiting = 0 WHERE name = ?", (rank, name))
            self.facts.set(generation=self.generation + 1, running=True, change=False)
            self.events.add("generation begins", "", generation=self.generation, workers=size)


def _said(found: list[tuple[str, Any, Any]]) -> tuple[str, str]:
    """What a worker has that the run has not, with both values of the fields in which they differ, and what would be right."""
    recipe = sum(path.startswith(RECIPE) for path, *_ in found)
    parts = [
        f"{path.removeprefix(RECIPE)} is {_value(theirs)} instead of {_value(ours)}"
        for path, ours, theirs in found[:MOST_NAMED]
    ]
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    kinds = {"recipe": recipe > 0, "version": recipe < len(found)}
    what = " and ".join(f"another {kind}" for kind, differs in kinds.items() if differs)
    remedy = " and ".join(way for way, differs in zip(REMEDIES, kinds.values(), strict=True) if differs)
    return f"{what} than this run ({'; '.join(parts)}{more})", remedy


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)

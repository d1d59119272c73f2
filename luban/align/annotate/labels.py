"""People's labels in SQLite: each is on the disk before it is confirmed."""

from __future__ import annotations

import hmac
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from luban.align.preferences import GRADES
from luban.core.errors import DataError, UsageError
from luban.core.hashing import data_sha256
from luban.core.jsonl import write_rows
from luban.core.metrics.agreement import agreement, cohen_kappa
from luban.core.seeding import generator
from luban.evals.judges.pairs import Match

ALONE = "annotator"  # who labels where nobody is named
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS labels (
    pair INTEGER NOT NULL, annotator TEXT NOT NULL,
    preference TEXT NOT NULL CHECK (preference IN ('first', 'second', 'tie')),
    grade INTEGER CHECK (grade BETWEEN 0 AND 3),
    unsafe_first INTEGER NOT NULL, unsafe_second INTEGER NOT NULL, note TEXT NOT NULL,
    swapped INTEGER NOT NULL, seconds REAL NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (pair, annotator));
"""


@dataclass(frozen=True, kw_only=True)
class PersonLabel:
    """One person's label of one pair, as the page sends it."""

    choice: str  # left, right or tie, of the answers as they were shown
    grade: int | None = None  # how much better, an index into GRADES; None: a tie
    unsafe_left: bool = False
    unsafe_right: bool = False
    note: str = ""
    seconds: float = 0.0  # it took

    def __post_init__(self):
        if self.choice not in ("left", "right", "tie"):
            raise DataError(f"choice is left, right or tie, {self.choice!r:.20} given")
        if (self.grade is None) != (self.choice == "tie") or self.grade not in (None, *range(len(GRADES))):
            raise DataError(f"grade is 0 to {len(GRADES) - 1} where an answer is preferred, and left out for a tie")


class LabelStore:
    """The labels of one set of pairs.

    Args:
        file: the SQLite file, made where it isn't there.
        annotators: name → key of those who may label; none: one, without a key.

    Raises:
        DataError: a file of other pairs, or one that isn't such a store. UsageError: two annotators with one key.
    """

    def __init__(self, file: Path, matches: Sequence[Match], annotators: Mapping[str, str] | None = None):
        self.file, self.matches, self.annotators = file, list(matches), dict(annotators or {})
        if len(set(self.annotators.values())) < len(self.annotators):
            raise UsageError("two annotators have the same key")
        identity = data_sha256([[m.prompt, *m.answers] for m in self.matches])
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(file, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
            found = self._db.execute("SELECT value FROM about WHERE name = 'pairs'").fetchone()
        except sqlite3.Error as error:
            raise DataError(f"{file} is no file of labels: {error}") from None
        if found is None:
            with self._db:
                self._db.execute("INSERT INTO about VALUES ('pairs', ?)", (identity,))
        elif found[0] != identity:
            self._db.close()
            raise DataError(f"{file} holds labels of other pairs: choose another --out")

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def who(self, key: str) -> str | None:
        """The annotator with this key; None: nobody has it."""
        if not self.annotators:
            return ALONE
        return next(
            (name for name, own in self.annotators.items() if hmac.compare_digest(own.encode(), key.encode())), None
        )

    def next_pair(self, annotator: str) -> int | None:
        """The first pair, in this annotator's own order, without a label of theirs."""
        done = {row[0] for row in self._read("SELECT pair FROM labels WHERE annotator = ?", annotator)}
        order = generator(0, "pairs", annotator).permutation(len(self.matches)).tolist()
        return next((pair for pair in order if pair not in done), None)

    def shown(self, pair: int, annotator: str, seed: int = 0) -> dict[str, Any]:
        """A pair as the page shows it, the side of each answer drawn."""
        match, swapped = self.matches[pair], self._swapped(pair, annotator, seed)
        left, right = match.answers[::-1] if swapped else match.answers
        return {"pair": pair, "prompt": match.prompt, "left": left, "right": right}

    @staticmethod
    def _swapped(pair: int, annotator: str, seed: int) -> bool:
        return bool(generator(seed, "sides", annotator, pair).integers(2))

    def label(self, pair: int, annotator: str, given: PersonLabel, seed: int = 0) -> None:
        """Keep a label, in the place of an earlier one. DataError for a pair that there isn't."""
        if not 0 <= pair < len(self.matches):
            raise DataError(f"there is no pair {pair}")
        swapped = self._swapped(pair, annotator, seed)
        side = {"left": "second" if swapped else "first", "right": "first" if swapped else "second", "tie": "tie"}
        unsafe = (given.unsafe_right, given.unsafe_left) if swapped else (given.unsafe_left, given.unsafe_right)
        row = (
            *(pair, annotator, side[given.choice], given.grade, *map(int, unsafe)),
            *(given.note[:2000], int(swapped), given.seconds, time.time()),
        )
        with self._lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def take_back(self, annotator: str) -> int | None:
        """Remove this annotator's latest label; the pair it was of, or None."""
        rows = self._read("SELECT pair FROM labels WHERE annotator = ? ORDER BY created DESC LIMIT 1", annotator)
        if not rows:
            return None
        with self._lock, self._db:
            self._db.execute("DELETE FROM labels WHERE pair = ? AND annotator = ?", (rows[0][0], annotator))
        return int(rows[0][0])

    def rows(self) -> list[dict[str, Any]]:
        """All labels, by pair and annotator."""
        names = (
            "pair",
            "annotator",
            "preference",
            "grade",
            "unsafe_first",
            "unsafe_second",
            "note",
            "swapped",
            "seconds",
        )
        found = self._read(f"SELECT {', '.join(names)} FROM labels ORDER BY pair, annotator")
        return [dict(zip(names, row, strict=True)) for row in found]

    def progress(self) -> dict[str, Any]:
        """How many pairs each annotator has labelled, and how far each two agree: agreement and Cohen's κ."""
        by_name: dict[str, dict[int, str]] = {name: {} for name in self.annotators or (ALONE,)}
        for row in self.rows():
            by_name.setdefault(row["annotator"], {})[row["pair"]] = row["preference"]
        pairs = []
        for one, other in combinations(by_name, 2):
            shared = sorted(by_name[one].keys() & by_name[other].keys())
            if shared:
                first, second = ([by_name[name][pair] for pair in shared] for name in (one, other))
                both = {"annotators": [one, other], "n": len(shared)}
                pairs.append(both | {"agreement": agreement(first, second), "kappa": cohen_kappa(first, second)})
        return {
            "pairs": len(self.matches),
            "done": {name: len(done) for name, done in by_name.items()},
            "agreement": pairs,
        }

    def _read(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()


def export_labels(store: LabelStore, file: Path) -> int:
    """Write the labels that prefer an answer as preferences that `luban reward` reads; returns how many.

    Raises DataError where there is none.
    """
    rows = []
    for label in store.rows():
        if label["preference"] == "tie":
            continue
        match, better = store.matches[label["pair"]], 0 if label["preference"] == "first" else 1
        unsafe = (bool(label["unsafe_first"]), bool(label["unsafe_second"]))
        rows.append(
            {
                "prompt": match.prompt,
                "chosen": match.answers[better],
                "rejected": match.answers[1 - better],
                "grade": label["grade"],
                "annotator": label["annotator"],
                "chosen_unsafe": unsafe[better],
                "rejected_unsafe": unsafe[1 - better],
                "note": label["note"],
            }
        )
    if not rows:
        raise DataError(f"{store.file} holds no label that prefers an answer")
    write_rows(file, rows)
    return len(rows)

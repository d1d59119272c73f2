"""The ledger of systems: what Luban is built to hold, and the evidence for what it holds today."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

LEDGER = Path(__file__).parent.parent / "systems.toml"
GROUPS = {
    "A": "Text",
    "B": "Architectures",
    "C": "Long context",
    "D": "Training at scale",
    "E": "Cluster network",
    "F": "Parameter-efficient tuning",
    "G": "Alignment",
    "H": "Retrieval and tools",
    "I": "Serving",
    "J": "Evaluation and accounting",
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One row. A row works when it names a module and a test that proves it."""

    id: str  # group letter and number
    name: str  # what it is
    paper: str = ""  # authors and year
    module: str = ""  # path of the implementation
    test: str = ""  # path of the test that proves it
    command: str = ""  # recipe or command that runs it
    published: str = ""  # the figure in the paper
    measured: str = ""  # the figure measured here
    hardware: str = ""  # what it was measured on
    missing: str = ""  # what the row still lacks, where it works only in part

    @property
    def status(self) -> str:
        """works, in part, or not yet. Working means usable and proved right by its test; that the paper's effect
        was seen too is said by `measured`, where it was."""
        if not (self.module and self.test):
            return "not yet"
        return "in part" if self.missing else "works"


def load_ledger(path: Path = LEDGER) -> list[System]:
    """Every row, in order."""
    return [System(**row) for row in tomllib.loads(path.read_text(encoding="utf-8"))["system"]]

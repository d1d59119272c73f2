"""Documents in groups, the answers to one prompt: what shards of preferences hold beside their tokens.

`SPLIT-00000.groups` (G + 1,) int64 first document of each group; `.ranks` (documents,) float32, the best first;
`.grades` (G,) int8; `.probabilities` (G,) float32. Where a reference model has read them: `.reference` (documents,) float32,
summed log-probabilities of the answers, and `.mismatched` (G,), of the next group's first answer after this group's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luban.core.errors import DataError
from luban.data.shards import Shards, split_file

GROUP_FORMAT = 1
FILES = {
    "groups": "<i8",
    "ranks": "<f4",
    "grades": "<i1",
    "probabilities": "<f4",
    "reference": "<f4",
    "mismatched": "<f4",
}
COMPUTED = ("reference", "mismatched")


class GroupWriter:
    """Writes one split of an artifact's folder."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokens: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.offsets, self.groups, self.ranks = [0], [0], list[float]()
        self.grades, self.probabilities = list[int](), list[float]()

    def add(
        self, answers: Sequence[tuple[Sequence[int], int, float]], *, grade: int = -1, probability: float = 1.0
    ) -> None:
        """Add a group: (token ids of prompt and answer, how many are the prompt's, rank) of each answer, the best first."""
        for ids, cut, rank in answers:
            mask = np.zeros(len(ids), dtype=np.uint8)
            mask[cut:] = 1
            self.tokens.append(np.asarray(ids, dtype=self.dtype))
            self.masks.append(mask)
            self.offsets.append(self.offsets[-1] + len(ids))
            self.ranks.append(rank)
        self.groups.append(self.groups[-1] + len(answers))
        self.grades.append(grade)
        self.probabilities.append(probability)

    def close(self) -> dict[str, int]:
        """Write the files; returns the split's figures."""
        tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, self.dtype)
        masks = np.concatenate(self.masks) if self.masks else np.zeros(0, np.uint8)
        tokens.tofile(split_file(self.folder, self.split, "tokens"))
        masks.tofile(split_file(self.folder, self.split, "mask"))
        np.array(self.offsets, dtype="<i8").tofile(split_file(self.folder, self.split, "offsets"))
        for name, dtype in FILES.items():
            if name not in COMPUTED:
                np.array(getattr(self, name), dtype=dtype).tofile(split_file(self.folder, self.split, name))
        return {
            "documents": len(self.ranks),
            "groups": len(self.grades),
            "tokens": len(tokens),
            "trained": int(masks.sum()),
            "bytes": 0,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """The groups of a split."""

    first: np.ndarray  # (G + 1,) int64: the first document of each, then the number of documents
    ranks: np.ndarray  # (documents,) float32
    grades: np.ndarray  # (G,) int8, -1: none
    probabilities: np.ndarray  # (G,) float32, that the first of a pair is the better one
    reference: np.ndarray | None  # (documents,) float32, nats
    mismatched: np.ndarray | None  # (G,) float32, nats; NaN: too long

    @classmethod
    def open(cls, shards: Shards) -> Groups:
        """Of a split. Raises DataError for shards that hold none."""
        if shards.config.get("groups") != GROUP_FORMAT:
            raise DataError(f"shards {shards.path} hold no preferences (prompt, chosen, rejected)")
        read = {}
        for name, dtype in FILES.items():
            file = split_file(shards.path, shards.split, name)
            read[name] = np.fromfile(file, dtype=dtype) if file.is_file() else None
        return cls(
            first=read["groups"],
            ranks=read["ranks"],
            grades=read["grades"],
            probabilities=read["probabilities"],
            reference=read["reference"],
            mismatched=read["mismatched"],
        )

    @property
    def count(self) -> int:
        """G."""
        return len(self.first) - 1

    @property
    def largest(self) -> int:
        """Answers of the largest group, K."""
        return int(np.diff(self.first).max(initial=0))

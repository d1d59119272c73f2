"""Which file holds which piece of which tensor: `index.json` of a checkpoint.

A tensor is held in pieces, rectangles that the processes which saved it had, each with its SHA-256. Pieces may overlap, where
processes had the same numbers; together they cover the tensor. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table
from luban.core.errors import ArtifactError, problem

INDEX = "index.json"
Point = tuple[int, ...]
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor, as a safetensors file holds it."""

    file: str  # in the checkpoint
    key: str  # its name in the file
    begin: Point  # index in the tensor of its first number
    shape: Point
    sha256: str | None = None  # of its little-endian bytes; None in checkpoints that had no index

    def overlap(self, begin: Sequence[int], shape: Sequence[int]) -> tuple[Slices, Slices] | None:
        """Where this piece and another rectangle overlap, in the coordinates of each; None: nowhere."""
        mine, theirs = [], []
        for at, size, other, length in zip(self.begin, self.shape, begin, shape, strict=True):
            low, high = max(at, other), min(at + size, other + length)
            if low >= high:
                return None
            mine.append(slice(low - at, high - at))
            theirs.append(slice(low - other, high - other))
        return tuple(mine), tuple(theirs)


@dataclass(frozen=True)
class Entry:
    """A tensor."""

    dtype: str  # torch's name
    shape: Point  # of the whole
    pieces: tuple[Piece, ...]

    def covered(self) -> bool:
        """Whether the pieces hold every number. The edges of all pieces cut the tensor into cells, which each piece marks, so that
        many pieces cost no more than the cells that they hold."""
        ends = [[at + size for at, size in zip(piece.begin, piece.shape, strict=True)] for piece in self.pieces]
        cells, order = 1, []
        for dim, size in enumerate(self.shape):
            edges = {0, size, *(piece.begin[dim] for piece in self.pieces), *(end[dim] for end in ends)}
            order.append({at: number for number, at in enumerate(sorted(edges))})
            cells *= len(edges) - 1
        seen: set[Point] = set()
        for piece, end in zip(self.pieces, ends, strict=True):
            seen.update(
                product(*(range(n[low], n[high]) for n, low, high in zip(order, piece.begin, end, strict=True)))
            )
        return len(seen) == cells


Index = dict[str, dict[str, Entry]]  # collection, such as "model" → name → tensor


def merged(parts: Sequence[Index]) -> Index:
    """The indices of all processes as one. Raises ArtifactError where pieces of a tensor don't fit or don't cover it."""
    found: Index = {}
    for part in parts:
        for collection, entries in part.items():
            into = found.setdefault(collection, {})
            for name, entry in entries.items():
                known = into.get(name, Entry(entry.dtype, entry.shape, ()))
                if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                    raise ArtifactError(
                        f"processes hold {name} as {known.dtype}{known.shape} and {entry.dtype}{entry.shape}"
                    )
                into[name] = Entry(entry.dtype, entry.shape, known.pieces + entry.pieces)
    for _, name, entry in entries_of(found):
        if not entry.covered():
            raise ArtifactError(f"no process holds some part of {name}, of shape {entry.shape}")
    return found


def entries_of(index: Index) -> Iterator[tuple[str, str, Entry]]:
    """(collection, name, tensor) of all."""
    for collection, entries in index.items():
        for name, entry in entries.items():
            yield collection, name, entry


def to_json(index: Index) -> dict[str, Any]:
    """Plain data, as written to disk."""
    return {
        collection: {name: asdict(entry) for name, entry in entries.items()} for collection, entries in index.items()
    }


def read_index(path: Path) -> Index:
    """The index of a checkpoint. Raises ArtifactError where it is damaged, or its pieces don't cover a tensor."""
    file = path / INDEX
    try:
        data: Mapping[str, Any] = read_table(file)
        found = {
            collection: {name: _entry(fields) for name, fields in entries.items()}
            for collection, entries in data.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {INDEX}: {problem(error)}") from error
    return merged([found])


def _entry(fields: Mapping[str, Any]) -> Entry:
    pieces = tuple(
        Piece(**{**piece, "begin": tuple(piece["begin"]), "shape": tuple(piece["shape"])}) for piece in fields["pieces"]
    )
    if any(Path(piece.file).name != piece.file for piece in pieces):
        raise ValueError("a piece lies outside of the checkpoint")
    return Entry(fields["dtype"], tuple(fields["shape"]), pieces)


@dataclass(frozen=True)
class Held:
    """A piece that a process has in memory."""

    collection: str
    name: str
    begin: Point
    shape: Point


def assign(held: Sequence[Mapping[Held, int]]) -> list[set[Held]]:
    """Which process writes which piece: each is written once, by the process that has the least to write of those that hold
    it. All processes come to the same result.

    Args:
        held: of each process, its pieces with their bytes.
    """
    holders: dict[Held, list[int]] = {}
    for rank, pieces in enumerate(held):
        for piece in pieces:
            holders.setdefault(piece, []).append(rank)
    loads, found = [0] * len(held), [set() for _ in held]
    order = sorted(
        holders, key=lambda piece: (-held[holders[piece][0]][piece], piece.collection, piece.name, piece.begin)
    )
    for piece in order:
        rank = min(holders[piece], key=lambda rank: (loads[rank], rank))
        loads[rank] += held[rank][piece]
        found[rank].add(piece)
    return found


def dumps(index: Index) -> str:
    """As text: one line, since an index of many pieces is long."""
    return json.dumps(to_json(index), sort_keys=True, separators=(",", ":")) + "\n"

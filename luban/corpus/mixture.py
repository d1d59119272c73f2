"""Corpora mixed by weight and epochs, as LLaMA mixes its seven sources (Touvron et al. 2023, table 1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luban.core.artifact import ArtifactWriter, as_parent, open_artifact
from luban.core.config import from_dict
from luban.core.errors import ConfigError, DataError
from luban.core.log import progress, warn
from luban.corpus import card
from luban.corpus.census import Census
from luban.corpus.document import Document
from luban.corpus.leaks import HeldOut
from luban.corpus.reader import read_corpus
from luban.corpus.split import HELDOUT, TRAIN
from luban.corpus.unique import UniqueIds
from luban.corpus.writer import SortedWriter, SplitWriter


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture."""

    path: str  # the corpus, a folder that luban corpus build or mix made
    weight: float  # share of the mixture's bytes, against the sum of all weights
    epochs: float = 1.0  # how often its documents may be used at the most
    name: str = ""  # how its documents' ids begin; by default the last part of the path

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or Path(self.path).name)
        for name, value in (("weight", self.weight), ("epochs", self.epochs)):
            _require_positive(f"mixture part '{self.name}'", name, value)


def _require_positive(part: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{part}: {name} must be a number above 0, {value!r} given")


EXAMPLE = """[[part]]
path = "corpora/wikipedia"
weight = 4.5
epochs = 2.45

[[part]]
path = "corpora/books"
weight = 4.5
"""


def parts_of(recipe: dict[str, Any], folder: Path | None = None) -> list[Part]:
    """The parts of a mixture recipe, their paths seen from `folder`. Raises ConfigError on unknown or missing fields."""
    tables = recipe.get("part")
    if set(recipe) != {"part"} or not isinstance(tables, list) or not tables:
        raise ConfigError(
            "a mixture recipe holds [[part]] tables with path and weight, optionally epochs and name, and nothing else "
            "(luban corpus mix --help has an example)"
        )
    parts = []
    for number, table in enumerate(tables, 1):
        for name in ("weight", "epochs"):
            if isinstance(table, dict) and name in table:
                _require_positive(f"mixture part {number}", name, table[name])  # a recipe's text is no number
        parts.append(from_dict(Part, table, f"part {number}"))
    names = [part.name for part in parts]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two parts of the mixture are called '{repeated[0]}': give one another name = \"…\"")
    return [replace(part, path=str((folder or Path()) / part.path)) for part in parts]


def mix(parts: list[Part], out: str | Path, *, size: int = 0, verify: bool = False) -> dict[str, Any]:
    """Write a corpus whose training bytes have the parts' shares, from the beginning to any point of it.

    Documents are taken in stored order, a further epoch's with `@2`, `@3`, … at the end of their ids; the part that is
    furthest behind its share comes next. Of held-out documents all are taken, once. A training document that is a
    held-out document of any part (luban.corpus.leaks) is left out, and counted in `figures["held_out_elsewhere"]`.

    Args:
        size: training bytes; 0 is as many as epochs and weights allow.
        verify: hash every part's files first.

    Raises:
        ArtifactError: a part is no corpus.
        ConfigError: a negative size.
        DataError: the parts cannot give `size` bytes within their epochs; the message names the one that is short.
    """
    if size < 0:
        raise ConfigError(f"the size of a mixture is a number of bytes, or 0 for as many as there are; {size} given")
    total = sum(part.weight for part in parts)
    shares = [part.weight / total for part in parts]
    manifests = [open_artifact(part.path, "corpus", verify=verify) for part in parts]
    leaks = _leaks(parts)
    usable = [manifest.figures[TRAIN]["bytes"] - leak.bytes for manifest, leak in zip(manifests, leaks, strict=True)]
    size = _size(parts, shares, usable, size)
    config = {"mixture": [{"name": p.name, "weight": p.weight, "epochs": p.epochs} for p in parts], "bytes": size}
    parents = tuple(as_parent(part.name, part.path) for part in parts)
    with ArtifactWriter(out, kind="corpus", config=config, parents=parents) as art:
        census = Census()  # every document of a corpus knows its licence
        writers = {TRAIN: SplitWriter(art.path, TRAIN), HELDOUT: SortedWriter(art.path, HELDOUT)}
        unique = UniqueIds()
        with progress("mixing", total=size, unit="bytes") as bar:
            for document in _train(parts, shares, size, leaks):
                writers[TRAIN].add(unique(document))
                census.add(document)
                bar.advance(document.bytes)
        for part in parts:
            for document in read_corpus(part.path, HELDOUT):
                writers[HELDOUT].add(unique(_named(document, part, 1)))
        for writer in writers.values():
            writer.close()
        art.figures.update({split: {"documents": w.documents, "bytes": w.bytes} for split, w in writers.items()})
        art.figures.update(census.figures())
        art.figures["held_out_elsewhere"] = {
            part.name: {"documents": len(leak.places), "bytes": leak.bytes}
            for part, leak in zip(parts, leaks, strict=True)
            if leak.places
        }
        art.terms = census.terms
        mixed = census.counts["sources"]
        art.figures["shares"] = {part.name: mixed[part.name]["bytes"] / writers[TRAIN].bytes for part in parts}
        (art.path / card.FILE).write_text(card.card(config, art.figures, None), encoding="utf-8")
    return art.figures


@dataclass
class _Leaks:
    """Training documents of a part that some part holds out."""

    places: set[int]  # their numbers in stored order
    bytes: int  # of their texts


def _leaks(parts: list[Part]) -> list[_Leaks]:
    """The leaks of every part; one pass over the held-out documents and, where there are any, one over the others."""
    held_out = HeldOut(document for part in parts for document in read_corpus(part.path, HELDOUT))
    found = []
    for part in parts:
        leaks = _Leaks(set(), 0)
        for number, document in enumerate(read_corpus(part.path, TRAIN) if len(held_out) else ()):
            if document in held_out:
                leaks.places.add(number)
                leaks.bytes += document.bytes
        if leaks.places:
            warn(
                f"{len(leaks.places)} training documents of the part '{part.name}' are held out by a part of the mixture, "
                f"so they are left out"
            )
        found.append(leaks)
    return found


def _size(parts: list[Part], shares: list[float], usable: list[int], size: int) -> int:
    """The training bytes of the mixture. Raises DataError where a part has not enough."""
    for part, bytes_ in zip(parts, usable, strict=True):
        if not bytes_:
            raise DataError(f"the part '{part.name}' of the mixture has nothing to train on that no part holds out")
    limits = [part.epochs * bytes_ / share for part, bytes_, share in zip(parts, usable, shares, strict=True)]
    short = min(range(len(parts)), key=limits.__getitem__)
    if size > limits[short]:
        raise DataError(
            f"the mixture of {size} bytes needs {shares[short] * size / usable[short]:.2f} epochs of the part "
            f"'{parts[short].name}', and {parts[short].epochs} are allowed: at most {int(limits[short])} bytes "
            f"can be mixed"
        )
    return size or int(limits[short])


def _train(parts: list[Part], shares: list[float], size: int, leaks: list[_Leaks]) -> Iterator[Document]:
    streams = [_epochs(part, leak.places) for part, leak in zip(parts, leaks, strict=True)]
    taken, total = [0] * len(parts), 0
    while total < size:
        behind = max(range(len(parts)), key=lambda i: shares[i] * total - taken[i])
        document = next(streams[behind])
        taken[behind] += document.bytes
        total += document.bytes
        yield document


def _epochs(part: Part, without: set[int]) -> Iterator[Document]:
    epoch = 1
    while True:
        for number, document in enumerate(read_corpus(part.path, TRAIN)):
            if number not in without:
                yield _named(document, part, epoch)
        epoch += 1


def _named(document: Document, part: Part, epoch: int) -> Document:
    again = f"@{epoch}" if epoch > 1 else ""
    meta = {**(document.meta or {}), "source": document.source}
    return replace(document, id=f"{part.name}/{document.id}{again}", source=part.name, meta=meta)

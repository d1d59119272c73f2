"""Adding documents to a finished index and removing them from it, without building it again.

A change writes new files beside the old ones and then replaces the manifest, so that it is seen whole or not at all. Files
of the version before stay until the next change, for processes that still search it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import MANIFEST, Manifest, write_json
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, DataError
from luban.core.hashing import file_sha256
from luban.retrieval.building import IndexConfig, figures_of, open_segments, write_segments
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import SEGMENTS, Index
from luban.retrieval.linking import write_graph
from luban.retrieval.passages import PassageRule
from luban.retrieval.segment import Segment


def change_index(
    path: str | Path,
    reader: DocumentReader | None = None,
    remove: Sequence[str] = (),
    *,
    encoder: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Remove documents from an index, then add the reader's; an added one takes the place of one with its id.

    Args:
        remove: ids of documents (the `source` of passages), or patterns of them such as `notes/*`.
        encoder: where the encoder that built the index is now; None: where it was.

    Returns the figures of the changed index.

    Raises:
        DataError: a name that no document has; nothing would be left.
        ArtifactError: no index, or another process is changing it.
        LineageError: the encoder isn't the one that built the index.
    """
    path = Path(path)
    with _locked(path):
        index = Index(path, encoder=encoder, device=device)
        _drop_leftovers(path, index.manifest)
        before, present = index.segments, index.present.copy()
        if remove:
            _remove(before, present, remove)
        manifest = index.manifest
        if reader is not None:
            config = _config_of(index)
            dense = index.encoder if config.encoder is not None else None
            write_segments(reader, path / SEGMENTS, config, dense, skipped=before)
            manifest = replace(manifest, parents=_merged(manifest, reader), terms=_terms(manifest, reader))
        segments = open_segments(path / SEGMENTS)
        added = segments[len(before) :]
        _replace(before, present, {name for segment in added for name, _, _ in segment.documents})
        present = np.concatenate([present, np.ones(sum(map(len, added)), dtype=bool)])
        if not present.any():
            raise DataError(f"nothing would be left of {path}: remove the folder instead")
        _commit(path, index, manifest, segments, present, reader.labels if reader is not None else ())
    return Index(path).manifest.figures


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises ArtifactError where another process has it."""
    if not path.is_dir():
        raise ArtifactError(f"{path} does not exist")
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ArtifactError(f"{path} is being changed by another process") from None
    finally:
        os.close(handle)


def _drop_leftovers(path: Path, manifest: Manifest) -> None:
    """Remove files of changes that were killed, and of the version before this one."""
    kept = {name.split("/")[1] for name in manifest.files if name.startswith(f"{SEGMENTS}/")}
    for folder in (path / SEGMENTS).iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
    for pattern in ("present-*", "graph-*"):
        for file in path.glob(pattern):
            if file.name not in manifest.files:
                file.unlink()


def _config_of(index: Index) -> IndexConfig:
    """The configuration that the index was built with."""
    settings, config = index.manifest.settings, index.config
    return IndexConfig(
        retriever=index.retriever,
        encoder=settings["encoder"],
        rule=from_dict(PassageRule, settings["rule"]),
        precision=config["precision"],
        search=config["search"],
        segment=config["segment"],
    )


def _remove(segments: Sequence[Segment], present: np.ndarray, names: Sequence[str]) -> None:
    """Mark the passages of the documents as gone. Raises DataError for a name that none has."""
    left, first = set(names), 0
    for segment in segments:
        for document, start, stop in segment.documents:
            here = slice(first + start, first + stop)
            matching = [name for name in names if name == document or fnmatchcase(document, name)]
            if matching and present[here].any():
                present[here] = False
                left -= set(matching)
        first += len(segment)
    if left:
        raise DataError(
            f"no document of the index is called '{min(left)}': see the sources that luban rag search prints"
        )


def _replace(segments: Sequence[Segment], present: np.ndarray, names: Collection[str]) -> None:
    """Mark the passages of documents that were added again as gone."""
    first = 0
    for segment in segments:
        for document, start, stop in segment.documents:
            if document in names:
                present[first + start : first + stop] = False
        first += len(segment)


def _merged(manifest: Manifest, reader: DocumentReader) -> tuple[Any, ...]:
    known = {(parent.role, parent.content_hash) for parent in manifest.parents}
    return (*manifest.parents, *(p for p in reader.parents if (p.role, p.content_hash) not in known))


def _terms(manifest: Manifest, reader: DocumentReader) -> tuple[str, ...]:
    return tuple(sorted({*manifest.terms, *reader.terms}))


def _commit(
    path: Path,
    index: Index,
    manifest: Manifest,
    segments: Sequence[Segment],
    present: np.ndarray,
    labels: Sequence[str],
) -> None:
    """Write what the change needs, then the manifest that lists it."""
    generation = index.config["generation"] + 1
    figures = {**manifest.figures, **figures_of(segments, present)}
    old = index.graph_file
    if index.config["search"] == "hnsw" and len(segments) > len(index.segments):
        figures["hnsw"] = write_graph(path, segments, generation, old)
        old = path / f"graph-{generation:06d}.usearch"
    files = {name: entry for name, entry in manifest.files.items() if name.startswith(f"{SEGMENTS}/")}
    fresh = [file for segment in segments[len(index.segments) :] for file in sorted(segment.folder.iterdir())]
    if not present.all():
        fresh.append(path / f"present-{generation:06d}.npy")
        np.save(fresh[-1], present)
    for file in fresh:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    if old is not None:
        files[old.name] = {}
    sources = list(dict.fromkeys([*index.config["sources"], *labels]))
    config = {**index.config, "generation": generation, "sources": sources}
    changed = replace(manifest, config=config, files=files, figures=figures)
    write_json(path / MANIFEST, replace(changed, content_hash=changed.compute_hash()).to_json())

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

from luban.core.artifact import MANIFEST, Manifest, open_artifact, write_json
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, DataError, LineageError
from luban.core.hashing import file_sha256
from luban.core.log import warn
from luban.retrieval.building import IndexConfig, figures_of, identified, open_segments, remembered, write_segments
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import KIND, SEGMENTS, Index
from luban.retrieval.linking import write_graph
from luban.retrieval.passages import PassageRule
from luban.retrieval.segment import Segment


def change_index(
    path: str | Path,
    reader: DocumentReader | None = None,
    remove: Sequence[str] = (),
    *,
    sync: bool = False,
    encoder: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Remove documents from an index, then add the reader's; an added one takes the place of one with its id.

    Args:
        remove: ids of documents (the `source` of passages), or patterns of them such as `notes/*`.
        sync: remove the documents that folders of the reader no longer give; else a warning names them.
        encoder: where the encoder that built the index is now, which the index remembers when something is added; None: where
            it was.

    Returns the figures of the changed index, and as `change` how many documents were `added`, `replaced` by those and `removed`.

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
        removed = _remove(before, present, remove) if remove else 0
        manifest, origins = index.manifest, index.manifest.settings.get("origins", {})
        if remove:
            origins = _still_read(origins, before, present)
        if reader is not None:
            config = _config_of(index)
            dense = index.encoder if config.encoder is not None else None
            write_segments(reader, path / SEGMENTS, config, dense, skipped=before)
            origins = {
                label: file for label, file in origins.items() if label not in reader.superseded
            } | reader.origins
            manifest = replace(manifest, parents=_merged(manifest, reader), terms=_terms(manifest, reader))
            if dense is not None and encoder is not None:  # it has moved, and is the one that built the index
                manifest = replace(manifest, settings={**manifest.settings, "encoder": remembered(str(encoder))})
        manifest = replace(manifest, settings={**manifest.settings, "origins": origins})
        segments = open_segments(path / SEGMENTS)
        added = segments[len(before) :]
        names = {name for segment in added for name, _, _ in segment.documents}
        replaced = 0
        if reader is not None:
            replaced = _replace(before, present, names, reader, index.manifest)
            gone = _gone(before, present, names, reader)
            if sync:
                removed += len(gone)
                present[[place for here in gone.values() for place in range(here.start, here.stop)]] = False
            elif gone:
                warn(
                    f"{path} keeps {len(gone)} documents that {', '.join(reader.folders)} gives no longer, such as "
                    f"'{next(iter(gone))}': --sync removes them, too"
                )
        present = np.concatenate([present, np.ones(sum(map(len, added)), dtype=bool)])
        if not present.any():
            raise DataError(f"nothing would be left of {path}: remove the folder instead")
        _commit(path, index, manifest, segments, present, reader.labels if reader is not None else ())
    change = {"added": len(names), "replaced": replaced, "removed": removed}
    return {**Index(path).manifest.figures, "change": change}


def known_origins(path: str | Path) -> dict[str, str]:
    """Which files and folders an index has read: `known` of a `DocumentReader` whose documents are added to it."""
    return open_artifact(path, KIND, verify=False).settings.get("origins", {})


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
    """The configuration that the index was built with. Raises LineageError where its passage tokenizer has changed."""
    settings, config = index.manifest.settings, index.config
    rule = from_dict(PassageRule, settings["rule"])
    if identified(rule)[0] != config["passages"]:
        raise LineageError(
            f"{index.path} was divided into passages by another tokenizer than {settings['rule']['tokenizer']} holds now: "
            "add with the one that built it, or build it again"
        )
    return IndexConfig(
        retriever=index.retriever,
        encoder=settings["encoder"],
        rule=rule,
        precision=config["precision"],
        search=config["search"],
        segment=config["segment"],
    )


def _remove(segments: Sequence[Segment], present: np.ndarray, names: Sequence[str]) -> int:
    """Mark the passages of the documents as gone, and count the documents. Raises DataError for a name that none has."""
    left, first, removed = set(names), 0, 0
    for segment in segments:
        for document, start, stop in segment.documents:
            here = slice(first + start, first + stop)
            matching = [name for name in names if name == document or fnmatchcase(document, name)]
            if matching and present[here].any():
                present[here] = False
                left -= set(matching)
                removed += 1
        first += len(segment)
    if left:
        raise DataError(
            f"no document of the index is called '{min(left)}': see the sources that luban rag search prints"
        )
    return removed


def _still_read(origins: dict[str, str], segments: Sequence[Segment], present: np.ndarray) -> dict[str, str]:
    """The origins of which a document is present; the labels of the others are free."""
    labels, first = set(), 0
    for segment in segments:
        for document, start, stop in segment.documents:
            if present[first + start : first + stop].any():
                labels.add(_label_of(document, origins))
        first += len(segment)
    return {label: path for label, path in origins.items() if label in labels}


def _label_of(document: str, labels: Collection[str]) -> str | None:
    """Which source a document is of, by its id: LABEL, LABEL#ROW, LABEL/FILE or LABEL/FILE#ROW; None: of none of these."""
    if document in labels:
        return document
    name = document.rpartition("#")[0] or document
    while name and name not in labels:
        name = name.rpartition("/")[0]
    return name or None


def _replace(
    segments: Sequence[Segment],
    present: np.ndarray,
    names: Collection[str],
    reader: DocumentReader,
    manifest: Manifest,
) -> int:
    """Mark the passages of documents that were added again as gone, and count the documents: those with the ids `names`, the
    other rows of files that were read again, and what was read under another label.
    """
    origins, superseded = manifest.settings.get("origins", {}), reader.superseded
    first, replaced, coinciding = 0, 0, list[str]()
    for segment in segments:
        for document, start, stop in segment.documents:
            here = slice(first + start, first + stop)
            row = document.rpartition("#")[0] in reader.files and document not in origins
            moved = superseded and _label_of(document, origins) in superseded
            again = document in names or row or moved
            if again and present[here].any():
                present[here] = False
                replaced += 1
                coinciding += [document] if document in names and _label_of(document, reader.origins) is None else []
        first += len(segment)
    others = sorted(set(manifest.config["sources"]) - set(reader.labels))
    if coinciding and others:  # else it is what they were read from that was read again
        warn(
            f"{len(coinciding)} documents of {', '.join(reader.labels)} take the place of documents with the same ids, such as "
            f"'{coinciding[0]}', which may be those of {', '.join(others)}: documents with the same id are one to an index"
        )
    return replaced


def _gone(
    segments: Sequence[Segment], present: np.ndarray, names: Collection[str], reader: DocumentReader
) -> dict[str, slice]:
    """The documents in folders that were read again which weren't found there: their ids, and where their passages are."""
    folders, found, first = tuple(f"{label}/" for label in reader.folders), dict[str, slice](), 0
    for segment in segments:
        for document, start, stop in segment.documents:
            here = slice(first + start, first + stop)
            if document.startswith(folders) and document not in names and present[here].any():
                found[document] = here
        first += len(segment)
    return found


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

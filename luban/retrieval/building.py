"""Building an index.

Segment after segment is written into `NAME.incomplete`; a build that was killed goes on behind the last finished one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luban.core.artifact import ArtifactWriter, Parent, read_table, write_json
from luban.core.config import to_dict
from luban.core.errors import ArtifactError, ConfigError, DataError
from luban.core.log import progress
from luban.retrieval.bm25 import K1, B
from luban.retrieval.documents import DocumentReader, passages_of
from luban.retrieval.index import KIND, SEGMENTS, Retriever
from luban.retrieval.linking import write_graph
from luban.retrieval.passages import PassageRule
from luban.retrieval.passages.tokens import Tokens
from luban.retrieval.passages.words import Words
from luban.retrieval.segment import Segment, SegmentWriter
from luban.retrieval.terms import FORMAT as TERMS_FORMAT

if TYPE_CHECKING:
    from luban.retrieval.encoder import TextEncoder

SEGMENT = 16_384  # passages after which a segment ends with its document
PART = ".part"  # suffix of a segment that is being written
STATE = "state.json"  # in a segment: how far the documents were read when it was finished
Search = Literal["exact", "hnsw"]


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What an index is built of."""

    retriever: Retriever = "bm25"
    encoder: str | None = None  # path or name of the sentence encoder; needed unless the retriever is bm25
    rule: PassageRule = field(default_factory=Words)
    precision: Literal["float32", "int8"] = "float32"  # in which vectors are stored
    search: Search = "exact"  # of vectors
    segment: int = SEGMENT  # passages after which a segment ends

    def __post_init__(self) -> None:
        if (self.retriever == "bm25") != (self.encoder is None):
            raise ConfigError(f"encoder: {self.retriever} {'has no' if self.encoder else 'needs an'} encoder")

    @property
    def lexical(self) -> bool:
        """Whether there is a BM25 side."""
        return self.retriever != "dense"


def build_index(reader: DocumentReader, out: str | Path, config: IndexConfig, *, device: str = "cpu") -> dict[str, Any]:
    """Build an index of the reader's documents; the same call again goes on with one that was interrupted.

    Returns the manifest's figures: passages, documents, bytes of text, and with HNSW the recall against exact search.

    Raises:
        DataError: no text.
        ArtifactError: `out` is taken, or written by another process, or the input changed since an interrupted build.
    """
    encoder = None
    if config.encoder is not None:
        from luban.retrieval.encoder import TextEncoder

        encoder = TextEncoder.load(config.encoder, device)
    rule, rule_parents = identified(config.rule)
    stored = {
        "retriever": config.retriever,
        "passages": rule,
        "terms": TERMS_FORMAT if config.lexical else None,
        "bm25": {"k1": K1, "b": B},
        "encoder": None if encoder is None else encoder.identity,
        "precision": config.precision,
        "search": config.search,
        "segment": config.segment,
        "sources": reader.labels,
        "generation": 0,
    }
    settings = {"encoder": remembered(config.encoder), "rule": _found_again(config.rule), "origins": reader.origins}
    parents = (*reader.parents, *(encoder.parents if encoder is not None else ()), *rule_parents)
    art = ArtifactWriter(
        out, kind=KIND, config=stored, parents=parents, settings=settings, resumable=True, volatile=("graph-*",)
    )
    with art:
        folder = art.path / SEGMENTS
        folder.mkdir(exist_ok=True)
        _drop_parts(folder)
        write_segments(reader, folder, config, encoder)
        segments = open_segments(folder)
        if not sum(map(len, segments)):
            raise DataError(f"{', '.join(reader.labels)}: no words to index")
        art.figures.update(figures_of(segments, np.ones(sum(map(len, segments)), dtype=bool)))
        if config.search == "hnsw":
            art.figures["hnsw"] = write_graph(art.path, segments, 0)
        art.terms = reader.terms
    return art.figures


def identified(rule: PassageRule) -> tuple[dict[str, Any], tuple[Parent, ...]]:
    """A rule as the index's identity has it, its tokenizer by its hash, and that tokenizer as a parent."""
    plain = to_dict(rule)
    if not isinstance(rule, Tokens):
        return plain, ()
    content_hash = rule.loaded().content_hash or ""
    parent = Parent(
        role="passage tokenizer", kind="tokenizer", content_hash=content_hash, name=Path(rule.tokenizer).name
    )
    return plain | {"tokenizer": content_hash}, (parent,)


def remembered(name: str | None) -> str | None:
    """How an index names its encoder or tokenizer: a packaged one by its name, any other by its whole path."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _found_again(rule: PassageRule) -> dict[str, Any]:
    """A rule by which documents can be added later, from any working directory."""
    plain = to_dict(rule)
    return plain | {"tokenizer": remembered(rule.tokenizer)} if isinstance(rule, Tokens) else plain


def write_segments(
    documents: DocumentReader,
    folder: Path,
    config: IndexConfig,
    encoder: TextEncoder | None,
    skipped: Sequence[Segment] = (),
) -> None:
    """Write the documents' passages as segments, behind those that are finished.

    Args:
        skipped: segments of an index that is being added to.

    Raises ArtifactError where the documents of a finished segment have changed.
    """
    finished = sorted(p for p in folder.iterdir() if p.suffix != PART)[len(skipped) :]
    states = [read_table(path / STATE) for path in finished]
    digest, read = hashlib.sha256(), 0
    writer = SegmentWriter(lexical=config.lexical, encoder=encoder, precision=config.precision)
    with progress("indexing", unit="docs") as bar:
        for document in documents:
            digest.update(f"{document.id}\0{document.text}\0".encode("utf-8", "replace"))
            read += 1
            bar.advance()
            if states and read <= states[-1]["documents"]:
                known = next((state for state in states if state["documents"] == read), None)
                if known is not None and known["digest"] != digest.hexdigest():
                    raise ArtifactError(
                        f"the documents have changed since the build was interrupted: remove {folder.parent} and build again"
                    )
                continue
            writer.add(document.id, passages_of(document, config.rule))
            if len(writer.passages) >= config.segment:
                _finish(writer, folder, read, digest.hexdigest())
                writer = SegmentWriter(lexical=config.lexical, encoder=encoder, precision=config.precision)
        if writer.passages:
            _finish(writer, folder, read, digest.hexdigest())


def _finish(writer: SegmentWriter, folder: Path, documents: int, digest: str) -> None:
    """Write a segment whole or not at all."""
    number = 1 + max((int(path.name) for path in folder.iterdir() if path.suffix != PART), default=-1)
    part = folder / f"{number:06d}{PART}"
    part.mkdir()
    writer.write(part)
    write_json(part / STATE, {"documents": documents, "digest": digest})
    os.rename(part, part.with_suffix(""))


def _drop_parts(folder: Path) -> None:
    for part in folder.glob(f"*{PART}"):
        shutil.rmtree(part)


def open_segments(folder: Path) -> list[Segment]:
    """The finished segments, in order."""
    return [Segment(path) for path in sorted(folder.iterdir()) if path.suffix != PART]


def figures_of(segments: Sequence[Segment], present: np.ndarray) -> dict[str, Any]:
    """Passages and documents that are present."""
    first, documents = 0, 0
    for segment in segments:
        here = present[first : first + len(segment)]
        documents += sum(bool(here[start:stop].any()) for _, start, stop in segment.documents)
        first += len(segment)
    return {"passages": int(present.sum()), "documents": documents}

"""A corpus's documents, in stored order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luban.core.artifact import open_artifact
from luban.corpus.arrow import require_pyarrow
from luban.corpus.document import Document
from luban.corpus.split import SPLITS, TRAIN
from luban.corpus.writer import from_row


def read_corpus(path: str | Path, split: str = TRAIN, *, verify: bool = False) -> Iterator[Document]:
    """Every document of a split, in stored order (held-out: by id), in bounded memory.

    Args:
        split: "train" or "heldout".
        verify: hash every file first, and compare.

    Raises:
        ArtifactError: `path` is no sound corpus.
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"a corpus has the splits {' and '.join(SPLITS)}, not {split!r}")
    open_artifact(path, "corpus", verify=verify)
    return _documents(sorted(Path(path).glob(f"{split}-*.parquet")), split)


def _documents(files: list[Path], split: str) -> Iterator[Document]:
    _, parquet = require_pyarrow("reading a corpus")
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield from_row(row, split)

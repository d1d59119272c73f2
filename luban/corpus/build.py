"""Sources → steps → split → Parquet files, as one artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from luban.core.artifact import ArtifactWriter
from luban.core.errors import ConfigError, DataError
from luban.core.log import progress, warn
from luban.corpus.arrow import require_pyarrow
from luban.corpus.document import Document
from luban.corpus.sources import Source, find_sources
from luban.corpus.split import HELDOUT, TRAIN, is_heldout
from luban.corpus.steps import DEFAULT_STEPS, STEPS
from luban.corpus.tally import Tally
from luban.corpus.writer import SortedWriter, SplitWriter


def build_corpus(sources: Sequence[str], out: str | Path, *, heldout: float = 0.05, seed: int = 0,
                 steps: Sequence[str] = DEFAULT_STEPS) -> dict[str, Any]:  # fmt: skip
    """Read every source, run the steps, split, and write the corpus to `out`.

    Args:
        sources: files, folders, globs, `python:stdlib`, `python:questions`.
        heldout: fraction of the documents (of the units, for `python:…`) kept from training, 0 to below 1.
        seed: of the split.
        steps: names in `STEPS`, in order.

    Returns:
        The figures that the manifest holds: documents and bytes of each split, what was dropped and why.

    Raises:
        ConfigError: a fraction out of range or an unknown step.
        DataError: a source that is missing, empty or binary, or nothing left after the steps.
    """
    if not 0 <= heldout < 1:
        raise ConfigError(f"heldout: a fraction from 0 to below 1 is needed, {heldout} given")
    chosen = [STEPS[name] for name in steps]
    require_pyarrow("building a corpus")
    found = find_sources(list(sources))
    tally = Tally()
    config = {"sources": [s.label for s in found], "steps": list(steps), "heldout": heldout}
    with ArtifactWriter(out, kind="corpus", config=config, seed=seed) as art:
        documents: Iterable[Document] = _read(found, tally, seed, heldout)
        for step in chosen:
            documents = step(documents, tally)
        writers = {TRAIN: SplitWriter(art.path, TRAIN), HELDOUT: SortedWriter(art.path, HELDOUT)}
        with progress("corpus", unit="docs") as bar:
            for document in documents:
                held = is_heldout(document.id, heldout, seed)
                writers[document.split or (HELDOUT if held else TRAIN)].add(document)
                bar.advance()
        for writer in writers.values():
            writer.close()
        if not writers[TRAIN].documents:
            raise DataError("nothing is left to train on after the steps and the held-out split")
        if heldout and not writers[HELDOUT].documents:
            warn(f"the corpus is too small for a held-out split: none of its {writers[TRAIN].documents} documents fell "
                 f"into the fraction {heldout}")  # fmt: skip
        for split, writer in writers.items():
            art.figures[split] = {"documents": writer.documents, "bytes": writer.bytes}
        art.figures.update(tally.figures())
    return art.figures


def _read(sources: Sequence[Source], tally: Tally, seed: int, heldout: float) -> Iterator[Document]:
    for source in sources:
        for document in source.documents(tally, seed, heldout):
            tally.add("documents_read")
            tally.add("bytes_read", document.bytes)
            yield document

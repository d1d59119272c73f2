"""Documents to be indexed: of corpora, of everything `luban corpus build` reads, and the paragraphs of question files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from luban.core.artifact import MANIFEST, Parent, as_parent, open_artifact
from luban.core.errors import DataError, UsageError
from luban.core.log import warn
from luban.corpus.census import Census
from luban.corpus.document import Document
from luban.corpus.reader import read_corpus
from luban.corpus.sources import Source, find_sources
from luban.corpus.sources.kinds import storable_name
from luban.corpus.split import SPLITS
from luban.corpus.tally import Tally
from luban.corpus.unique import UniqueIds
from luban.retrieval.passages import Passage, PassageRule
from luban.retrieval.questions import is_question_file, paragraphs

TITLES = ("title", "object", "module", "subject")  # fields of a document's meta that may hold its title


class DocumentReader:
    """Reads the documents below some paths, always in the same order.

    Args:
        paths: corpora (both their splits), or sources as `luban corpus build` takes them, or files of questions in SQuAD's
            format, of which the paragraphs are read.
        licences: source → licence as an SPDX expression, "" for every other source.
        text_field: of rows of JSON, Parquet and CSV, the field that holds the text.
        known: the `origins` of an index that the documents are added to. What it has read before keeps its name, so that
            its documents are replaced, and what it hasn't gets another one where its own is taken.

    Raises:
        UsageError: no path is given.
        DataError: a path that does not exist.
    """

    def __init__(
        self,
        paths: Sequence[str],
        licences: Mapping[str, str] | None = None,
        text_field: str = "text",
        known: Mapping[str, str] | None = None,
    ):
        if not paths:
            raise UsageError(
                "nothing to index: name a corpus, files, folders or a built-in source such as python:stdlib"
            )
        self.corpora = [path for path in paths if (Path(path) / MANIFEST).is_file()]
        self.questions = [path for path in paths if path not in self.corpora and is_question_file(Path(path))]
        others = [path for path in paths if path not in {*self.corpora, *self.questions}]
        for corpus in self.corpora:
            open_artifact(corpus, "corpus", verify=False)
        self.known = known or {}
        self.sources = named_as_before(find_sources(others, text_field) if others else [], self.known)
        self.files: set[str] = set()  # with `known`, labels of the files that were read so far; no corpora
        self.census = Census(licences)
        self.tally = Tally()

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The corpora as ancestors of an index."""
        return tuple(as_parent("corpus", corpus) for corpus in self.corpora)

    @property
    def labels(self) -> list[str]:
        """Names of what is read, without the machine's folders."""
        return [Path(path).resolve().name for path in (*self.corpora, *self.questions)] + [
            s.label for s in self.sources
        ]

    @property
    def folders(self) -> list[str]:
        """Labels of the folders that are read."""
        return [s.label for s in self.sources if s.kind == "folder"]

    @property
    def origins(self) -> dict[str, str]:
        """Label → whole path of the files and folders that are read: what `known` takes."""
        return {s.label: str(Path(s.name).resolve()) for s in self.sources if not is_builtin(s)}

    @property
    def superseded(self) -> list[str]:
        """Labels of `known` whose files are read under another one now, with a folder above them."""
        folders = {Path(s.name).resolve(): s.label for s in self.sources if s.kind == "folder"}
        return [
            label
            for label, path in self.known.items()
            for folder, name in folders.items()
            if reads(folder, Path(path)) and not label.startswith(f"{name}/")
        ]

    @property
    def terms(self) -> tuple[str, ...]:
        """Licences of the documents that were read, apart from those of corpora, which are parents."""
        return self.census.terms

    def __iter__(self) -> Iterator[Document]:
        """The documents, with unique ids and with their licences in `meta`. Raises DataError where there is none."""
        unique, found = UniqueIds(), False
        for document in self._documents():
            found = True
            licensed = self.census.licensed(document)
            self.census.add(licensed)
            yield unique(licensed)
        if unique.renamed and len(self.corpora) > 1:
            warn(f"{unique.renamed} documents have ids that others have: #2, #3, … stands behind theirs in the index")
        for what, count in self.tally.unusable.items():
            warn(f"not indexed: {count} {what}, such as {self.tally.unusable_samples[what][0]}")
        if not found:
            raise DataError(f"{', '.join(self.labels)}: no text to index")

    def _documents(self) -> Iterator[Document]:
        for corpus in self.corpora:
            for split in SPLITS:
                yield from read_corpus(corpus, split)
        for path in self.questions:
            yield from paragraphs(Path(path))
        for source in self.sources:
            for document in source.documents(self.tally, 0, 0.0):
                if self.known:
                    self.files.add(document.source)
                yield replace(document, split=None)


def named_as_before(sources: Sequence[Source], known: Mapping[str, str]) -> list[Source]:
    """The sources with the labels by which an index knows them, each file or folder once.

    A file below a folder that the index has read is named as it was then. Where another path has the label, and is still there,
    a source gets `#2`, `#3`, … behind it.

    Args:
        known: label → path of what the index has read.
    """
    before = {path: label for label, path in known.items()}
    taken = {label for label, path in known.items() if Path(path).exists()}
    folders = {Path(source.name).resolve() for source in sources if source.kind == "folder"}
    found: dict[tuple[str, Path], Source] = {}
    for source in sources:
        path = Path(source.name) if is_builtin(source) else Path(source.name).resolve()
        if (source.kind, path) in found or any(reads(folder, path) for folder in folders):
            continue
        above = next((folder for folder in (path, *path.parents) if str(folder) in before), None)
        if above is not None:
            label = "/".join((before[str(above)], *map(storable_name, path.relative_to(above).parts)))
        else:
            numbered = [f"{storable_name(path.name)}#{number}" for number in range(2, len(taken) + 3)]
            label = next(name for name in (source.label, *numbered) if name not in taken)
            if label != source.label:
                warn(f"{source.name} is indexed as {label}, since {source.label} is another file or folder")
        taken.add(label)
        found[source.kind, path] = replace(source, label=label)
    return list(found.values())


def is_builtin(source: Source) -> bool:
    """Whether a source is no file or folder, such as python:objects."""
    return source.kind == source.name


def reads(folder: Path, path: Path) -> bool:
    """Whether a file or folder is one that a source reads with the folder above it; hidden ones aren't."""
    return folder in path.parents and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def passages_of(document: Document, rule: PassageRule) -> Iterator[Passage]:
    """The passages of a document; none of one without words."""
    meta = document.meta or {}
    named = next((meta[field] for field in TITLES if isinstance(meta.get(field), str) and meta[field]), None)
    title = named or document.id.rpartition("/")[2]
    licence = meta.get("licence")
    for start, stop, section in rule.spans(document.text):
        yield Passage(
            text=document.text[start:stop],
            title=f"{title} > {section}" if section else title,
            source=document.id,
            start=start,
            stop=stop,
            licence=licence if isinstance(licence, str) else "",
        )

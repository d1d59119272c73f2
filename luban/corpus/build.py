"""Sources → steps → split → Parquet files, as one artifact, by any number of workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from luban.core.artifact import ArtifactWriter
from luban.core.errors import ArtifactError, ConfigError, DataError, LubanError, closest, nearest
from luban.core.log import progress, warn
from luban.corpus import card
from luban.corpus.arrow import require_pyarrow
from luban.corpus.census import Census
from luban.corpus.document import Document
from luban.corpus.engine import EXECUTORS, WorkerLost
from luban.corpus.engine.phase import Task, applied, phases_of, read_marker
from luban.corpus.engine.plan import plan_tasks
from luban.corpus.engine.spill import read_spill
from luban.corpus.licences import NAMES, unknown_names
from luban.corpus.ragged import Ragged
from luban.corpus.split import HELDOUT, TRAIN, is_heldout
from luban.corpus.steps import DEFAULT_STEPS, identity, make_step
from luban.corpus.tally import Tally
from luban.corpus.unique import UniqueIds
from luban.corpus.writer import SortedWriter, SplitWriter

WORK = "work"  # folder of the unfinished corpus in which parts lie


def build_corpus(
    sources: Sequence[str],
    out: str | Path,
    *,
    heldout: float = 0.05,
    seed: int = 0,
    steps: Sequence[str] = DEFAULT_STEPS,
    workers: int = 1,
    on: str = "local",
    bad_share: float = 0.05,
    licences: Mapping[str, str] | None = None,
    text_field: str = "text",
) -> dict[str, Any]:
    """Read every source, run the steps, split, and write the corpus to `out`.

    The bytes written depend on sources, steps, split and seed alone. A build that was killed goes on, when called
    again with the same arguments, with the parts that it had not finished.

    Args:
        sources: files, folders, globs, `python:stdlib`, `python:questions`.
        heldout: fraction of the documents (of the units, for `python:…`) kept from training, 0 to below 1.
        seed: of the split.
        steps: names in `STEPS`, in order, each with `=ARGUMENT` where it takes one.
        workers: processes, or tasks at a time.
        on: a name in `EXECUTORS`.
        licences: source (its label or path) → its licence as an SPDX expression, "" for all other sources; a document's
            own and that of licence files beside it go before it.
        bad_share: fraction of unusable records (lines, files, members) from which the build is refused, 0 to 1.
        text_field: field of JSON, Parquet and CSV rows that holds the text.

    Returns:
        The figures that the manifest holds: documents and bytes of each split, what was dropped and why.

    Raises:
        ConfigError: a fraction out of range, an unknown step, an unknown licence, or one of a source that is not given.
        DataError: a source that is missing, empty or binary, too much that is unusable, or nothing left.
    """
    _check_options(heldout, bad_share, text_field)
    require_pyarrow("building a corpus")
    make_step.cache_clear()  # evaluation sets and models may have changed since an earlier build
    executor = EXECUTORS[on](workers)
    steps = [spec.strip() for spec in steps]
    phases, tally = phases_of(steps), Tally()
    plan = plan_tasks(sources, phases[0], tally, seed, heldout, text_field)
    if not plan.tasks:
        raise DataError(f"source {', '.join(plan.names.values())} holds no file to read")
    config = {
        "sources": plan.labels,
        "steps": [identity(spec) for spec in steps],
        "heldout": heldout,
        "licences": _declared(licences or {}, plan.names),
        **({} if text_field == "text" else {"text_field": text_field}),
    }
    census = Census(config["licences"])
    with ArtifactWriter(out, kind="corpus", config=config, seed=seed, resumable=True) as art, executor:
        try:
            is_held = partial(is_heldout, fraction=heldout, seed=seed)
            tasks = [replace(task, work=art.path / WORK) for task in plan.tasks]
            _same_input(art.path / WORK, plan.fingerprint)
            waterfall: list[dict[str, Any]] = []
            for phase in phases:
                tasks = [replace(task, phase=phase) for task in tasks]
                _run_phase(tasks, executor)
                _merge(tasks, waterfall, tally)
                if phase.number == 0:
                    _check_input(plan.names, tasks, waterfall, tally, bad_share)
            writers = _write(tasks, art.path, waterfall, tally, census, is_held)
            if not writers[TRAIN].documents:
                raise DataError(_nothing_left(waterfall, tally, writers[HELDOUT].documents))
        except WorkerLost:
            raise
        except LubanError:
            shutil.rmtree(art.path, ignore_errors=True)
            raise
        shutil.rmtree(art.path / WORK)
        art.figures.update(tally.figures(), **census.figures(), waterfall=waterfall)
        _document(art, writers, census)
    return art.figures


def _check_options(heldout: float, bad_share: float, text_field: str) -> None:
    """Raise ConfigError where one is out of range."""
    if not 0 <= heldout < 1:
        raise ConfigError(f"heldout: a fraction from 0 to below 1 is needed, {heldout} given")
    if not 0 <= bad_share <= 1:
        raise ConfigError(f"bad_share: a fraction from 0 to 1 is needed, {bad_share} given")
    if not text_field:
        raise ConfigError("text_field: the name of a field is needed")


def _declared(licences: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Licences by the labels of their sources, which may be named by label, path or the glob that was given.

    Raises:
        ConfigError: a licence that is empty or no SPDX expression, or a source that is not among those of the build.
    """
    found: dict[str, str] = {}
    for source, licence in licences.items():
        labels = [label for label, path in names.items() if Path(path) == Path(source) or fnmatch(path, source)]
        labels = [source] if source in ("", *names) else labels
        if not labels:
            known = f"{nearest(source, names)}; the sources are {', '.join(list(names)[:10])}"
            raise ConfigError(f"licences: no source is called '{source}'{known}")
        if not licence.strip():
            raise ConfigError(f"licences: the licence of {source or 'all sources'} is empty")
        if unknown := unknown_names(licence):
            raise ConfigError(
                f"licences: '{unknown[0]}' is no licence of SPDX's list{closest(unknown[0], NAMES)}; a name of your own "
                f"begins with LicenseRef-"
            )
        found.update(dict.fromkeys(labels, licence))
    return dict(sorted(found.items()))


def _nothing_left(waterfall: list[dict[str, Any]], tally: Tally, heldout: int) -> str:
    """Why no document is left to train on."""
    if heldout:
        return (
            f"nothing is left to train on: the held-out split took all {heldout} documents; --heldout 0 holds none out"
        )
    left = ", ".join(f"{row['documents']} after {row['step']}" for row in waterfall)
    why = ", ".join(f"{counts['documents']} by {reason}" for reason, counts in sorted(tally.dropped.items()))
    return f"nothing is left to train on: documents {left}{f' (dropped: {why})' if why else ''}"


def _document(art: ArtifactWriter, writers: dict[str, Any], census: Census) -> None:
    """Sizes, licences and the card of a corpus that is written."""
    for split, writer in writers.items():
        art.figures[split] = {"documents": writer.documents, "bytes": writer.bytes}
    art.terms = census.terms
    config, seed = art.manifest.config, art.manifest.seed
    (art.path / card.FILE).write_text(card.card(config, art.figures, seed), encoding="utf-8")
    if config["heldout"] and not writers[HELDOUT].documents:
        warn(
            f"the corpus is too small for a held-out split: none of its {writers[TRAIN].documents} documents fell "
            f"into the fraction {config['heldout']}"
        )


def _same_input(work: Path, fingerprint: str) -> None:
    """Parts of an interrupted build are only used where the input is still the same."""
    work.mkdir(exist_ok=True)
    known = work / "input"
    if known.is_file() and known.read_text() != fingerprint:
        raise ArtifactError(
            "the input has changed since the build was interrupted, so what it had done is removed: "
            "run the command again"
        )
    known.write_text(fingerprint)


def _run_phase(tasks: list[Task], executor: Any) -> None:
    """Run what is not done yet; then the spills before this phase are needed no more."""
    missing = [task for task in tasks if not task.marker.is_file()]
    phase, before = tasks[0].phase, tasks[0].phase.number - 1
    if missing and phase.apply is not None:
        decide([replace(task, phase=replace(task.phase, number=before)) for task in tasks], phase.apply)
    names = ", ".join([*phase.steps, *([phase.fingerprint] if phase.fingerprint else [])]) or "reading"
    with progress(f"corpus: {names}", unit="docs") as bar:
        executor.run(missing, bar)
    if before >= 0:
        for file in tasks[0].path(before).parent.glob("*"):
            if file.suffix != ".json":
                file.unlink()


def decide(tasks: list[Task], spec: str) -> None:
    """From every part's fingerprints the flags of every part."""
    shards = [Ragged.load(task.path(task.phase.number)) for task in tasks]
    for task, flags in zip(tasks, make_step(spec).decide(shards), strict=True):
        flags.save(task.flags)


def _merge(tasks: list[Task], waterfall: list[dict[str, Any]], tally: Tally) -> None:
    """Add up, in part order, what the tasks of a phase counted."""
    first = len(waterfall)
    for task in tasks:
        marker = read_marker(task)
        tally.merge(marker["tally"])
        for place, row in enumerate(marker["waterfall"], first):
            if place == len(waterfall):
                waterfall.append(row)
            else:
                waterfall[place] = {**row, **{k: waterfall[place][k] + row[k] for k in ("documents", "bytes")}}


def _check_input(
    names: dict[str, str], tasks: list[Task], waterfall: list[dict[str, Any]], tally: Tally, bad_share: float
) -> None:
    """Refuse sources that gave no document, and input of which too much is unusable."""
    given = dict.fromkeys(names, 0)
    for task in tasks:
        given[task.source.label] += read_marker(task)["waterfall"][0]["documents"]
    for label, count in given.items():
        if not count:
            raise DataError(f"source {names[label]} holds no text{_unusable(tally)}")
    bad = tally.unusable.total()
    if bad > bad_share * (bad + waterfall[0]["documents"]):
        raise DataError(
            f"{bad} records of the input are unusable beside {waterfall[0]['documents']} documents, more "
            f"than the share of {bad_share}{_unusable(tally)}; luban corpus build --bad-share allows more"
        )


def _unusable(tally: Tally) -> str:
    kinds = [f"{count} {what}, such as {tally.unusable_samples[what][0]}" for what, count in tally.unusable.items()]
    return f" ({'; '.join(kinds)})" if kinds else ""


def _write(
    tasks: list[Task],
    folder: Path,
    waterfall: list[dict[str, Any]],
    tally: Tally,
    census: Census,
    is_held: Callable[[str], bool],
) -> dict[str, Any]:
    """The last decision, and the files of both splits."""
    for split in (TRAIN, HELDOUT):
        for file in folder.glob(f"*{split}-*"):
            file.unlink()  # of a run that was killed while writing
    last = tasks[0].phase
    if last.fingerprint:
        decide(tasks, last.fingerprint)
        waterfall.append({"step": last.fingerprint, "documents": 0, "bytes": 0})
    writers, unique = {TRAIN: SplitWriter(folder, TRAIN), HELDOUT: SortedWriter(folder, HELDOUT)}, UniqueIds()
    with progress("corpus: writing", unit="docs") as bar:
        for document in map(census.licensed, _left(tasks, tally)):
            if last.fingerprint:
                waterfall[-1]["documents"] += 1
                waterfall[-1]["bytes"] += document.bytes
            writers[document.split or (HELDOUT if is_held(document.id) else TRAIN)].add(unique(document))
            census.add(document)
            bar.advance()
    tally.add("repeated_ids_renamed", unique.renamed)
    for writer in writers.values():
        writer.close()
    return writers


def _left(tasks: list[Task], tally: Tally) -> Iterator[Document]:
    for task in tasks:
        documents = read_spill(task.path(task.phase.number))
        if task.phase.fingerprint:
            flags = Ragged.load(task.flags)
            documents = applied(make_step(task.phase.fingerprint), documents, flags, tally)
        yield from documents

"""Finds what a page can show: artifacts below some directories, their figures, curves and samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.artifact import MANIFEST, Manifest, read_manifest
from luban.core.errors import ArtifactError, DataError
from luban.core.log import read_metrics, warn
from luban.core.units import count
from luban.core.whole_directory import INCOMPLETE
from luban.report.alignment_run import alignment_charts, reward_chart, reward_model_rows, rollouts_of
from luban.report.chart import Chart, Level, Mark, Series, draw, smooth
from luban.report.goodput import failures_line, goodput_rows
from luban.report.predicted_vs_measured import predicted_vs_measured

SMOOTHED_STEPS, SMOOTHED_SHARE = 20, 0.02  # steps that the training curve is averaged over: so many, or a share of all
SMALL_WIDTH, SMALL_HEIGHT = 400, 230  # of a chart that shares its row with others
TONES = "abcd"
HEADLINES = {  # artifact kind → figures worth a line in its box, the first that is there
    "corpus": (("documents", "{:,} documents"),),
    "tokenizer": (("vocab_size", "{:,} tokens"),),
    "shards": (("tokens", "{:,} tokens"),),
    "run": (
        ("accuracy", "accuracy {:.1%}"),
        ("heldout_accuracy", "held-out accuracy {:.1%}"),
        ("heldout_reward", "held-out reward {:.3f}"),
        ("heldout_loss", "held-out loss {:.3f}"),
        ("bits_per_byte", "{:.3f} bits per byte"),
    ),
    "evaluation": (
        ("which_module_accuracy", "which module: {:.0%}"),
        ("bits_per_byte", "{:.3f} bits per byte"),
        ("answer_loss", "answer loss {:.3f}"),
    ),
}


@dataclass(frozen=True)
class Found:
    """One artifact on disk."""

    path: Path
    manifest: Manifest
    name: str  # its directory's, or the whole path where several have that name


def find_artifacts(folders: Iterable[Path], *, by_age: bool = True) -> list[Found]:
    """Artifacts that are one of the folders or directly below one, each once, oldest first, or in the order given.

    Raises DataError where there is none in one of the folders.
    """
    folders, found = list(folders), {}
    for folder in folders:
        places = [p for p in (folder, *sorted(folder.glob("*"))) if p.is_dir() and (p / MANIFEST).is_file()]
        if not places:
            what = (
                "holds no artifact" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
            )
            raise DataError(f"nothing to report: {folder} {what}")
        for path in places:
            if path.resolve() not in found:
                try:
                    found[path.resolve()] = (path, read_manifest(path))
                except ArtifactError as error:
                    warn(f"left out of the report: {error}")
    if not found:
        raise DataError(f"nothing to report: no artifact that can be read in {', '.join(map(str, folders))}")
    names = Counter(path.name for path, _ in found.values())
    artifacts = [
        Found(path, manifest, (path.name if names[path.name] == 1 else str(path)).removesuffix(INCOMPLETE))
        for path, manifest in found.values()
    ]
    return sorted(artifacts, key=lambda f: f.manifest.created) if by_age else artifacts


def headline(found: Found) -> str:
    """The one figure of an artifact that its box in the family tree shows."""
    known = {**found.manifest.config, **found.manifest.figures}
    splits = [known[name] for name in ("train", "heldout") if isinstance(known.get(name), dict)]
    for key, words in HEADLINES.get(found.manifest.kind, ()):
        value = sum(split.get(key, 0) for split in splits) or known.get(key)
        if isinstance(value, (int, float)):
            return words.format(value)
    return ""


def figures_of(evaluations: Iterable[Found]) -> dict[str, float]:
    """Figures of these evaluations, a later one's winning."""
    return {name: value for found in evaluations for name, value in found.manifest.figures.items()}


def evaluations_of(run: Found, artifacts: Iterable[Found]) -> list[Found]:
    """The evaluations on the corpora that `run` was trained on; one that names no corpus belongs to the model it measured."""
    shards = run.manifest.parent("shards")
    trained_on = {p.content_hash for p in (shards.parents if shards else ()) if p.kind == "corpus"}
    found = []
    for each in artifacts:
        corpora = {p.content_hash for p in each.manifest.parents if p.kind == "corpus"}
        model = each.manifest.parent("model")
        same_model = model is not None and model.content_hash == run.manifest.content_hash
        if each.manifest.kind == "evaluation" and (corpora & trained_on if corpora else same_model):
            found.append(each)
    return found


def read_items(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _picture(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "svg": draw(chart), "legend": [(s.name, s.tone) for s in chart.series if not s.faint]}


def _column(rows: list[dict[str, Any]], name: str, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(row["step"], row[name] * scale) for row in rows if isinstance(row.get(name), (int, float))]


def run_section(found: Found, figures: dict[str, float]) -> dict[str, Any] | None:
    """The curves of one training run: loss (in bits per byte where the run measured them) and its small charts.

    Args:
        figures: those of the evaluations on the run's own corpora.
    """
    rows = read_metrics(found.path / "metrics.jsonl") if (found.path / "metrics.jsonl").is_file() else []
    if not rows:
        return None
    own = found.manifest.figures
    measured = [row for row in rows if row.get("bits_per_byte") and row.get("heldout_loss")]
    scale = measured[-1]["bits_per_byte"] / measured[-1]["heldout_loss"] if measured else 1.0
    steps, tokens = (max(row.get(name, 0) for row in rows) for name in ("step", "tokens"))
    marks, kept = [_mark(each) for each in spikes_of(own, rows)], kept_rows(rows)
    train = _column(kept, "loss", scale)
    heldout = _column(kept, "bits_per_byte") or _column(kept, "heldout_loss")
    levels = [
        Level(f"{name} {flag}", figures[key], tone)
        for name, flag, key, tone in (("gzip", "-9", "gzip_bits_per_byte", "d"), ("xz", "-9e", "xz_bits_per_byte", "c"))
        if measured and key in figures
    ]
    main = Chart(
        f"{found.name}: loss",
        "step",
        "bits per byte" if measured else "loss" if "accuracy" in rows[0] else "loss, nats a token",
        [
            Series("each step", _column(rows, "loss", scale), "a", faint=True),
            Series("training, smoothed", smooth(train, max(SMOOTHED_STEPS, SMOOTHED_SHARE * steps)), "a"),
            Series("held out", heldout, "b", dots=True),
        ],
        levels,
        marks,
        clip_start=0.08,
    )
    about = f"{steps:,} steps, {count(float(tokens))} tokens."
    if measured:
        about += " Training loss is shown in bits per byte by the held-out text's tokens per byte."
        if window := measured[-1].get("heldout_seq_len"):
            about += f" Held-out text was read in windows of {window:,} tokens; longer ones give fewer bits."
    if marks:
        about += f" Marked: {'; '.join(mark.name for mark in marks)}."
    return {
        "title": f"Learning: {found.name}",
        "about": about,
        "main": _picture(reward_chart(found.name, rows) or main),
        "small": [p for p in map(_picture, [*alignment_charts(rows, own), *_small_charts(rows, marks)]) if p["svg"]],
        "reward_model": reward_model_rows(own),
        "rollouts": rollouts_of(found.path),
        "predicted_vs_measured": predicted_vs_measured(own, rows),
        "goodput": goodput_rows(own),
        "failures": failures_line(own),
        "caveats": [str(caveat) for caveat in own.get("prediction_caveats", ())],
    }


def kept_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the steps that a run went back over."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if "back_to" in row:
            found = [each for each in found if each["step"] <= row["back_to"]]
        found.append(row)
    return found


def spikes_of(figures: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spikes that training found, from the manifest, each with the row of metrics that says what was done about it, if
    training went back."""
    returns = {row["step"]: row for row in rows if "back_to" in row}
    return [{**returns.get(spike["step"], {}), **spike} for spike in figures.get("spikes", ())]


def _mark(spike: dict[str, Any]) -> Mark:
    done = f", back to step {spike['back_to']:,}" if "back_to" in spike else ""
    return Mark(f"spike of the {spike['what']} at step {spike['step']:,}, {spike['value']:.4g}{done}", spike["step"])


def _small_charts(rows: list[dict[str, Any]], marks: list[Mark]) -> list[Chart]:
    """Speed, learning rate, gradient norm, and what tells several tasks apart."""

    def chart(title: str, unit: str, column: str, tone: str = "a", **options: Any) -> Chart:
        series = [Series(title.partition(",")[0], _column(rows, column), tone)]
        return Chart(title, "step", unit, series, width=SMALL_WIDTH, height=SMALL_HEIGHT, **options)

    return [
        chart("tokens a second", "tokens/s", "tokens_per_second", zero=True),
        chart("learning rate", "learning rate", "lr", "c", zero=True),
        chart("gradient norm, before clipping", "norm", "grad_norm", "d", clip_start=0.05, marks=marks),
        *_task_charts(rows),
    ]


def _task_charts(rows: list[dict[str, Any]]) -> list[Chart]:
    """Of a run with several tasks: each one's held-out loss, and how far their gradients agree."""
    found = []
    for prefix, title, unit in (
        ("heldout_loss/", "held-out loss of each task", "nats a target"),
        ("gradient_cosine/", "cosine between two tasks' gradients (below 0: they conflict)", "cosine"),
    ):
        names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
        series = [
            Series(
                name.removeprefix(prefix).replace("/", " and "), _column(rows, name), TONES[i % len(TONES)], dots=True
            )
            for i, name in enumerate(names)
        ]
        if series:
            found.append(Chart(title, "step", unit, series, width=SMALL_WIDTH, height=SMALL_HEIGHT))
    return found

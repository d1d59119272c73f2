"""One self-contained page from run directories."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from luban.core.artifact import atomic_write, package_versions
from luban.core.lineage import ancestors
from luban.core.page import environment, page_style
from luban.core.units import bytes_, count, seconds
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import row_tokens
from luban.report.alignment_tax import stages_of, tax_tree
from luban.report.comparison import compare
from luban.report.gather import Found, evaluations_of, figures_of, find_artifacts, headline, read_items, run_section
from luban.report.lineage_graph import family_of
from luban.report.long_context import long_context_sections
from luban.tokenizer.tokenizer import load_tokenizer

SHOWN_TOKENS = 600  # of a pack: what fits on a screen


def write_report(folders: Sequence[Path], out: Path, title: str = "A language model, from text to answers") -> None:
    """Write the page for the artifacts in `folders`, reading `stages.json` and `summary.json` beside them.

    Raises:
        DataError: no artifact in any of the folders.
    """
    artifacts = find_artifacts(folders)
    evaluations = [f for f in artifacts if f.manifest.kind == "evaluation"]
    compared = [f for f in find_artifacts(folders, by_age=False) if f.manifest.kind == "evaluation"]
    measured = stages_of(compared)
    stages, summary = _beside(folders, "stages.json") or [], _beside(folders, "summary.json") or {}
    runs = [f for f in artifacts if f.manifest.kind == "run"]
    template = environment().from_string((Path(__file__).parent / "page.html.jinja").read_text(encoding="utf-8"))
    sections = [s for s in (run_section(run, figures_of(evaluations_of(run, evaluations))) for run in runs) if s]
    sections += long_context_sections(evaluations)
    for section in sections:
        for picture in [*([section["main"]] if section["main"] else []), *section["small"]]:
            picture["svg"] = Markup(picture["svg"])
    drawn = family_of((f.name, f.manifest, headline(f)) for f in artifacts if f.manifest.status == "finished")
    versions = ", ".join(f"{k} {v}" for k, v in package_versions().items())
    page = template.render(
        title=title,
        subtitle=_subtitle(artifacts),
        tiles=_tiles(evaluations, runs, summary),
        style=Markup(page_style()),
        family=Markup(drawn),
        comparisons=compare(compared),
        stages_measured=measured,
        tax=Markup(tax_tree(compared, measured)),
        curves=sections,
        packs=_packs(artifacts),
        samples=[item for f in artifacts for item in read_items(f.path / "samples.jsonl")],
        stages=_stages(stages),
        machine=f"{platform.machine()}, {_cores()}.",
        figures=_every_figure(evaluations),
        footer=f"Written by Luban. {versions}.",
    )
    atomic_write(out, page)


def _beside(folders: Sequence[Path], name: str) -> Any:
    path = next((f / name for f in folders if (f / name).is_file()), None)
    return json.loads(path.read_text(encoding="utf-8")) if path else None


def _cores() -> str:
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores, {bytes_(total)} memory"


def _subtitle(artifacts: Sequence[Found]) -> str:
    runs = [f for f in artifacts if f.manifest.kind == "run"]
    older = {parent.content_hash for run in runs for parent in ancestors(run.manifest)}
    newest = [run.name for run in runs if run.manifest.content_hash not in older]
    if len(newest) > 1:
        return f"The runs {', '.join(newest[:-1])} and {newest[-1]}, and what they were made from"
    return "How this model came to be: " + " → ".join(f.name for f in artifacts)


def _every_figure(evaluations: Sequence[Found]) -> list[tuple[str, str]]:
    """Names and values; where several evaluations have a figure, each with its evaluation's name."""
    owners = Counter(name for found in evaluations for name in found.manifest.figures)
    rows = [
        (name if owners[name] == 1 else f"{name}, {found.name}", value)
        for found in evaluations
        for name, value in found.manifest.figures.items()
    ]
    return [
        (name, f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v))
        for name, v in sorted(rows, key=itemgetter(0))
    ]


def _tiles(evaluations: Sequence[Found], runs: Sequence[Found], summary: dict[str, Any]) -> list[dict[str, str]]:
    tiles, figures = [], figures_of(evaluations)
    measured = [found for found in evaluations if "bits_per_byte" in found.manifest.figures]
    for found in measured:
        own = found.manifest.figures
        beside_xz = (
            "xz_bits_per_byte" in own
        )  # of held-out documents; tasks of kind rolling measure texts of any source
        tiles.append(
            {
                "label": "held-out " * beside_xz + "bits per byte" + (f", {found.name}" if len(measured) > 1 else ""),
                "value": f"{own['bits_per_byte']:.3f}",
                "note": f"xz -9e needs {own['xz_bits_per_byte']:.3f}" if beside_xz else "",
            }
        )
    if summary.get("answer_loss_before"):
        drop = 1 - summary["answer_loss_after"] / summary["answer_loss_before"]
        tiles.append(
            {
                "label": "held-out answer loss",
                "value": f"{summary['answer_loss_after']:.3f}",
                "note": f"{drop:.0%} below the base model",
            }
        )
    if "which_module_accuracy" in figures:
        tiles.append(
            {
                "label": "“which module has …”",
                "value": f"{figures['which_module_accuracy']:.0%}",
                "note": f"best constant answer {figures['which_module_majority']:.0%}",
            }
        )
    for run in runs[:1]:
        speed, tokens = run.manifest.figures.get("tokens_per_second"), run.manifest.figures.get("tokens")
        if speed and tokens:
            tiles.append(
                {"label": "tokens trained on", "value": count(float(tokens)), "note": f"{speed:,.0f} tokens a second"}
            )
    if summary.get("seconds"):
        tiles.append(
            {
                "label": "from text to answers",
                "value": seconds(sum(summary["seconds"].values())),
                "note": f"peak memory {bytes_(summary['peak_rss_bytes'])}",
            }
        )
    return tiles


def _packs(artifacts: Sequence[Found]) -> list[dict[str, Any]]:
    packs = []
    for found in artifacts:
        if found.manifest.kind != "shards":
            continue
        shards = Shards.open(found.path)
        chat = shards.has_mask
        loader = Loader(
            shards,
            batch_size=1,
            seq_len=min(SHOWN_TOKENS, shards.tokens - 1),
            seed=0,
            packing="fit" if chat else "stream",
        )
        row = row_tokens(loader.batch(0), 0, load_tokenizer(found.path / "tokenizer"))
        tokens = [{**token, "style": _style(token)} for token in row]
        packs.append(
            {
                "title": "What instruction tuning sees" if chat else "What pretraining sees",
                "tokens": tokens,
                "about": "One packed row. Each tint is a document that attends only to itself, its positions starting anew; "
                + (
                    "underlined tokens are trained on: the answers and their end tokens."
                    if chat
                    else "underlined tokens are trained on: all but a document's first."
                ),
            }
        )
    return packs


def _style(token: dict[str, Any]) -> str:
    """The classes of a token: its document's tint, whether it is trained on, a document's start, a special token."""
    special = token["text"].startswith("<|") and token["text"].endswith("|>")
    words = [f"d{token['document'] % 4}"] + ["on"] * token["trained"] + ["edge-mark"] * (token["position"] == 0)
    return " ".join(words + ["special"] * special)


def _stages(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((stage["seconds"] for stage in stages), default=1)
    largest = max((stage["peak_rss_bytes"] for stage in stages), default=1)
    return [
        {
            "name": stage["name"],
            "seconds_text": seconds(stage["seconds"]),
            "seconds_share": 100 * stage["seconds"] / longest,
            "bytes_text": bytes_(stage["peak_rss_bytes"]),
            "bytes_share": 100 * stage["peak_rss_bytes"] / largest,
        }
        for stage in stages
    ]

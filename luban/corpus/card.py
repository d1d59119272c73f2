"""The card beside every corpus: what is in it, where it is from, under which terms, and what was done to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from luban.core.errors import closest
from luban.corpus.census import UNKNOWN
from luban.corpus.licences import NAMES, unknown_names

FILE = "README.md"
LISTED = 12  # languages named
SHOWN = 120  # characters of a sample


def card(config: Mapping[str, Any], figures: Mapping[str, Any], seed: int | None) -> str:
    """The card as Markdown, from the manifest's configuration and figures; the same for the same corpus."""
    sections = [
        "# Corpus\n\n"
        + _table(
            ("split", "documents", "bytes"),
            [(split, figures[split]["documents"], figures[split]["bytes"]) for split in ("train", "heldout")],
        ),
        "## Sources\n\n" + _table(("source", "documents", "bytes"), _rows(figures["sources"])),
        "## Licences\n\n" + _table(("licence", "documents", "bytes"), _rows(figures["licences"])),
        "## Languages\n\n" + _table(("language", "documents", "bytes"), _rows(figures["languages"])[:LISTED]),
    ]
    if "waterfall" in figures:
        sections.append(
            f"## Steps\n\nHeld out: {config['heldout']} of the documents, by the hash of their ids, seed {seed}.\n\n"
            + _table(
                ("after", "documents", "bytes"),
                [(row["step"], row["documents"], row["bytes"]) for row in figures["waterfall"]],
            )
        )
        dropped = [(why, d["documents"], d["bytes"]) for why, d in sorted(figures["dropped"].items())]
        if dropped:
            sections.append("### Dropped\n\n" + _table(("reason", "documents", "bytes"), dropped))
        for title, kept in (("Dropped, for example", "dropped_samples"), ("Changed, for example", "changes_samples")):
            if figures[kept]:
                sections.append(f"### {title}\n\n{_samples(figures[kept])}")
        if figures["unusable"]:
            sections.append("### Unusable input\n\n" + _table(("what", "records"), sorted(figures["unusable"].items())))
    sections.append("## Known gaps\n\n" + "\n".join(f"- {gap}" for gap in gaps(config, figures)))
    return "\n\n".join(sections) + "\n"


def gaps(config: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Caveats about the corpus."""
    steps = [step if isinstance(step, str) else step["step"] for step in config.get("steps", [])]
    names = {step.partition("=")[0] for step in steps}
    found = []
    if "unknown" in figures["licences"]:
        found.append("The licence of some documents is unknown.")
    for name in dict.fromkeys(name for licence in figures["licences"] for name in unknown_names(licence)):
        if name != UNKNOWN:
            found.append(f"The licence name '{name}' is not on SPDX's list{closest(name, NAMES)}.")
    if "unknown" in figures["languages"]:
        found.append("The language of some documents is unknown: the step `language` tells it.")
    if "waterfall" in figures:
        for step, words in (
            ("exact", "Repeated documents were not looked for."),
            ("minhash", "Near-duplicates were not looked for."),
            ("contamination", "No evaluation set was filtered out."),
            ("personal", "Personal data was not looked for."),
        ):
            if step not in names:
                found.append(words)
        for step in config.get("steps", []):
            if isinstance(step, Mapping) and step.get("too_short"):
                found.append(
                    f"{step['too_short']:,} of {step['texts']:,} texts of the evaluation sets are too short to be "
                    f"looked for."
                )
    return found or ["None is known."]


def _rows(counted: Mapping[str, Mapping[str, int]]) -> list[tuple[str, int, int]]:
    rows = [(name, counts["documents"], counts["bytes"]) for name, counts in counted.items()]
    return sorted(rows, key=lambda row: (-row[2], row[0]))


def _samples(kept: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """The first few texts of each reason, so that a person can judge it; indented, so that no text is taken for Markdown."""
    lines = []
    for reason, samples in sorted(kept.items()):
        lines += [f"- {reason}:", "", *(f"      {s['id']}: {' '.join(s['text'].split())[:SHOWN]}" for s in samples), ""]
    return "\n".join(lines).rstrip()


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in line) + " |" for line in lines
    )

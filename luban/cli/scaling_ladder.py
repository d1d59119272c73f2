"""`luban scaling ladder`: small models trained, extrapolated, and checked against the next size."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luban.core.arguments import parse_recipe
from luban.core.errors import UsageError
from luban.core.log import print_result
from luban.core.units import count

if TYPE_CHECKING:
    from luban.train.ladder import Rung

ABOUT = """Train a recipe at growing widths, tokens proportional to parameters; fit a power law to their held-out losses; predict the
loss of a larger model with an interval; train that one too and say whether it came true. Everything is in --out, runs in folders
of their own, ladder.csv for luban scaling. The same command resumes.

--widths N …    of the ladder, multiples of 8 (16 24 32 48)
--check N       the width that is predicted and then trained (64); 0: none
--ratio R       tokens a parameter, without embeddings (20)"""
USAGE = "RECIPE --data.path SHARDS --out DIR [--widths N …] [--check N] [--ratio R] [--json] [--section.field value …]"
EXAMPLES = """
luban scaling ladder luban_ladder_cpu --data.path shards --out runs/ladder
luban scaling ladder luban_ladder_cpu --data.path shards --out runs/small --widths 8 16 24 --check 32 --ratio 10
luban scaling runs/ladder/ladder.csv
"""


def run(argv: Sequence[str]) -> int:
    """Train, fit, predict, check."""
    from luban.cli.training import RECIPES
    from luban.train.recipe import Recipe

    own, rest = split_options(argv, {"widths": [16, 24, 32, 48], "check": 64, "ratio": 20.0, "json": False})
    call = parse_recipe(
        Recipe, rest, verb="scaling ladder", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, usage=USAGE
    )
    from luban.scaling.ladder import power_law
    from luban.train.ladder import climb, rung_recipe

    widths = sorted(own["widths"])
    if own["check"] and own["check"] <= widths[-1]:
        raise UsageError(f"--check is wider than the ladder, whose widest is {widths[-1]}, not {own['check']}")
    for width in [*widths, *([own["check"]] if own["check"] else [])]:  # refused before anything is trained
        rung_recipe(call.recipe, width, own["ratio"])
    call.out.mkdir(parents=True, exist_ok=True)
    rungs = climb(call.recipe, call.out, widths, own["ratio"], show_rung)
    law = power_law([rung.flops for rung in rungs], [rung.loss for rung in rungs])
    found: dict[str, Any] = {"rungs": [asdict(rung) for rung in rungs], "law": asdict(law)}
    if own["check"]:
        (checked,) = climb(call.recipe, call.out, [own["check"]], own["ratio"])
        low, high = law.interval(checked.flops)
        predicted = law.loss(checked.flops)
        found["check"] = {
            **asdict(checked),
            "predicted": predicted,
            "interval": [low, high],
            "error": checked.loss / predicted - 1,
            "inside": low <= checked.loss <= high,
        }
        rungs.append(checked)
    _write(call.out / "ladder.csv", rungs)
    (call.out / "ladder.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print_result(json.dumps(found, indent=1) if own["json"] else "\n".join(_lines(found)))
    return 0


def split_options(argv: Sequence[str], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The verb's own options, and the words of the recipe.

    Args:
        known: name → value where it isn't given: json (a flag), widths (a list), and numbers, whole ones as int.

    Raises UsageError for a value that isn't right.
    """
    own = dict(known)
    words, rest = list(argv), []
    while words:
        word = words.pop(0)
        if word == "--json":
            own["json"] = True
        elif word == "--widths":
            own["widths"] = []
            while words and words[0].isdecimal():
                own["widths"].append(int(words.pop(0)))
            if len(set(own["widths"])) < 3:
                raise UsageError("--widths takes at least three different widths")
        elif word.startswith("--") and word[2:] in known:
            text = words.pop(0) if words else ""
            own[word[2:]] = _number(word, text, type(known[word[2:]]))
        else:
            rest.append(word)
            if word.startswith("--") and "=" not in word and words and word not in ("--help", "--debug"):
                rest.append(words.pop(0))
    return own, rest


def _number(option: str, text: str, kind: type) -> float | int:
    """A whole number from 0, or any number above it."""
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if value < 0 or (kind is float and not 0 < value < float("inf")):
        raise UsageError(f"{option} takes a number {'from' if kind is int else 'above'} 0, {text!r} given")
    return value


def show_rung(rung: Rung) -> None:
    from luban.core.log import say

    say(
        f"width {rung.width}: {count(rung.parameters)} parameters, {count(rung.tokens)} tokens, held-out loss {rung.loss:.4f}"
    )


def _write(path: Path, rungs: Sequence[Rung]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["parameters", "tokens", "loss", "width"])
        writer.writerows([rung.parameters, rung.tokens, rung.loss, rung.width] for rung in rungs)


def _lines(found: dict[str, Any]) -> list[str]:
    law = found["law"]
    lines = [f"{'width':>6} {'layers':>6} {'parameters':>10} {'tokens':>8} {'FLOPs':>9} {'held-out loss':>13}"]
    for row in found["rungs"]:
        lines.append(
            f"{row['width']:>6} {row['layers']:>6} {count(row['parameters']):>10} {count(row['tokens']):>8} "
            f"{row['flops']:>9.2e} {row['loss']:>13.4f}"
        )
    lines.append(
        f"L = {law['factor']:.4g} · C^-{law['exponent']:.4f}, spread {law['spread']:.2%} over {law['points']} rungs"
    )
    if "check" in found:
        row = found["check"]
        low, high = row["interval"]
        lines.append(
            f"width {row['width']}: predicted {row['predicted']:.4f} ({low:.4f} to {high:.4f}), trained {row['loss']:.4f}: "
            f"{row['error']:+.2%}, {'inside' if row['inside'] else 'outside of'} the 95% interval"
        )
    return lines

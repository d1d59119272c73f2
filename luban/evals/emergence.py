"""Text and tasks on which a ladder of small models shows what grows with size: learning in context, gaining by writing steps, and
one ability measured smoothly and by a threshold (Brown et al. 2020; Wei et al. 2022a, b; Schaeffer et al. 2023).

Documents are of three families, a third each.

rule: `k>n a>d z>c …`, every letter moved on by one drawn number. What the number is stands in the document only, so that examples help.
sums: `now 3 4 8 5:0` gives the last digit of a sum at once, `steps 3 4 8 5:3 7 5 0` writes the last digit of every partial sum first.
addition: `123+989=1112`. An answer is right as a whole or wrong (the threshold), or each of its tokens has a likelihood (smooth).

Sums and additions that tasks ask for stand in no document.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.config import to_toml
from luban.core.jsonl import write_rows
from luban.core.seeding import generator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAIRS = 12  # of a rule's document
SHOTS = 8  # pairs before the one that is asked
TERMS = (4, 6)  # of a sum, fewest and most
DIGITS = 3  # of the numbers that are added
LINES = 4  # of a document of sums or additions
HELD = 8  # one question in so many is asked and never trained on

Row = dict[str, Any]


def held_out(question: str) -> bool:
    """Whether a sum or an addition is kept for tasks, by a hash of its text."""
    return zlib.crc32(question.encode()) % HELD == 0


def _pair(letter: int, offset: int) -> str:
    return f"{LETTERS[letter]}>{LETTERS[(letter + offset) % len(LETTERS)]}"


def _rule(rng: np.random.Generator, pairs: int) -> list[str]:
    """Pairs of different letters under one drawn rule."""
    offset = int(rng.integers(1, len(LETTERS)))
    return [_pair(int(letter), offset) for letter in rng.permutation(len(LETTERS))[:pairs]]


def _sum(rng: np.random.Generator, held: bool) -> tuple[str, str]:
    """(terms, last digits of the partial sums), of questions that are held out or that aren't."""
    while True:
        terms = rng.integers(0, 10, int(rng.integers(TERMS[0], TERMS[1] + 1)))
        question = " ".join(map(str, terms.tolist()))
        if held_out(question) == held:
            return question, " ".join(map(str, (terms.cumsum() % 10).tolist()))


def _addition(rng: np.random.Generator, held: bool) -> tuple[str, str]:
    while True:
        first, second = rng.integers(10 ** (DIGITS - 1), 10**DIGITS, 2).tolist()
        question = f"{first}+{second}="
        if held_out(question) == held:
            return question, str(first + second)


def _sum_line(rng: np.random.Generator) -> str:
    question, steps = _sum(rng, held=False)
    return f"steps {question}:{steps}" if rng.random() < 0.5 else f"now {question}:{steps[-1]}"


def documents(count: int, seed: int) -> Iterator[Row]:
    """Rows with `text`, families in turn."""
    for number in range(count):
        rng = generator(seed, "emergence", number)
        if number % 3 == 0:
            text = " ".join(_rule(rng, PAIRS))
        elif number % 3 == 1:
            text = "\n".join(_sum_line(rng) for _ in range(LINES))
        else:
            text = "\n".join("".join(_addition(rng, held=False)) for _ in range(LINES))
        yield {"id": str(number), "text": text + "\n"}


def _items(count: int, seed: int) -> dict[str, list[Row]]:
    """The items of every task, by its name."""
    found: dict[str, list[Row]] = {
        name: [] for name in ("rule_0", f"rule_{SHOTS}", "sums_now", "sums_steps", "addition")
    }
    for number in range(count):
        rng = generator(seed, "emergence_items", number)
        *shown, last = _rule(rng, SHOTS + 1)
        asked, answer = last[:2], last[2]
        found["rule_0"].append({"question": asked, "answer": answer})
        found[f"rule_{SHOTS}"].append({"question": " ".join([*shown, asked]), "answer": answer})
        question, steps = _sum(rng, held=True)
        found["sums_now"].append({"question": f"now {question}:", "answer": steps[-1]})
        found["sums_steps"].append({"question": f"steps {question}:", "answer": steps[-1]})
        question, answer = _addition(rng, held=True)
        found["addition"].append({"question": question, "answer": f"{answer}\n"})
    return found


def write_tasks(folder: Path, count: int, seed: int) -> list[str]:
    """Task files, with their items beside them, for `luban eval`; returns their paths.

    Args:
        count: items of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {"type": "generate", "max_tokens": 4 * TERMS[1], "stop": ["\n"], "metrics": ["number"]}
    paths = []
    for name, rows in _items(count, seed).items():
        write_rows(folder / f"{name}.jsonl", rows)
        spec = {
            "data": f"{name}.jsonl",
            "prompt": "{{question}}",
            "target": "{{answer}}",
            "target_delimiter": "",
            "kind": written if name.startswith("sums") else {"type": "loglikelihood"},
        }
        (folder / f"{name}.toml").write_text(to_toml(spec), encoding="utf-8")
        paths.append(str(folder / f"{name}.toml"))
    return paths


def sharpness(values: Sequence[float]) -> float:
    """How sudden a figure's change along a ladder is: its largest step between neighbours as a fraction of its range. A straight
    line of n points has 1 / (n - 1), a jump 1; 0 where nothing changes."""
    span = max(values) - min(values)
    steps = [abs(after - before) for before, after in pairwise(values)]
    return max(steps) / span if span else 0.0


def growth(results: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """What grows along a ladder, a value a model.

    Args:
        results: of each model, figures of an evaluation by name, as results.json has them.
    """

    def column(name: str) -> list[float]:
        return [float(each[name]["value"]) for each in results]

    none, some = column("rule_0/acc"), column(f"rule_{SHOTS}/acc")
    now, steps = column("sums_now/number"), column("sums_steps/number")
    return {
        "no examples": none,
        "with examples": some,
        "gain in context": [b - a for a, b in zip(none, some, strict=True)],
        "answer at once": now,
        "answer after steps": steps,
        "gain by steps": [b - a for a, b in zip(now, steps, strict=True)],
        "whole answer right": column("addition/acc"),
        "likelihood of a token": [float(np.exp(-nats)) for nats in column("addition/nats_per_token")],
    }

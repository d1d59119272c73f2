"""Small tasks and rows that tests of evaluations share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from luban.core.config import to_toml
from luban.evals.requests import Written

COLOURS = [
    {"q": "Grass is", "options": ["green", "red"], "gold": 0},
    {"q": "The sky is", "options": ["pink", "blue", "brown"], "gold": 1},
    {"q": "Snow is", "options": ["black", "white"], "gold": "white"},
    {"q": "Coal is", "options": ["black", "white", "green", "orange"], "gold": "A"},
    {"q": "A lemon is", "options": ["violet", "yellow"], "gold": "1"},
]
CHOICE = {"prompt": "{{q}}", "target": "{{gold}}", "kind": {"type": "loglikelihood", "choices": "options"}}


def write_task(folder: Path, name: str, spec: dict, rows=None) -> str:
    """A task file, with its data beside it; returns its path."""
    if rows is not None:
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec = {"data": file.name, **spec}
    (folder / f"{name}.toml").write_text(to_toml(spec), encoding="utf-8")
    return str(folder / f"{name}.toml")


def read_json(path: Path):
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Scripted:
    """A backend that says what a function makes of a request."""

    name = identity = "scripted"
    round_size = 8

    def __init__(self, say):
        self.say, self.asked = say, []
        self.counts = Counter()

    def about(self):
        """Nothing."""
        return {}

    def seen(self, prompt):
        """As it is."""
        return str(prompt)

    def respond(self, requests):
        """One response a request."""
        self.asked += requests
        found = [self.say(request) for request in requests]
        return [Written(text=said, finish_reason="stop") if isinstance(said, str) else said for said in found]

"""Every command of the guide is one that its verb understands, and every task and file that the guide names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from luban.cli import annotate, judge, report
from luban.cli import data_alignment as data
from luban.cli import eval as evaluation
from luban.core.arguments import parse
from luban.evals.filters import FILTERS
from luban.evals.kinds.base import KINDS
from luban.evals.names import shipped_tasks
from luban.evals.scorers import SCORERS

GUIDE = (Path(__file__).parents[3] / "docs" / "EVALUATION.md").read_text()
OPTIONS = {
    "eval": evaluation.Args,
    "judge": judge.Arguments,
    "annotate": annotate.Arguments,
    "report": report.Args,
    "data ghost_attention": data.GhostAttentionArgs,
    "data instruct": data.InstructArgs,
    "data overoptimisation": data.OveroptimisationArgs,
    "data revise": data.ReviseArgs,
    "data sharegpt": data.ShareGPTArgs,
}


def test_every_command_is_understood():
    lines = re.findall(r"^luban .*$", GUIDE, re.M)
    assert len(lines) >= 15
    for line in lines:
        words = shlex.split(line)[1:]
        verb = " ".join(words[: 2 if words[0] == "data" else 1])
        parse(OPTIONS[verb], words[len(verb.split()) :], verb=verb, about="")


def test_what_the_guide_lists_is_all_there_is():
    kinds = re.findall(r"^\| `(\w+)` \| (?:the likelihood|a text)", GUIDE, re.M)
    assert set(kinds) == set(KINDS.entries)
    listed = set(re.findall(r"`(\w+)`", re.search(r"\nFilters: (.*?)\. `shot_data`", GUIDE, re.S)[1]))
    assert listed == set(FILTERS.entries)
    metrics = set(re.findall(r"`(\w+)`", re.search(r"through `filters` \| `metrics`: (.*?) \|", GUIDE)[1]))
    assert metrics == set(SCORERS.entries)
    shipped = re.search(r"Tasks that ship: (.*?)\n\n", GUIDE, re.S)[1]
    for name in shipped_tasks():
        assert any(name.startswith(word) for word in (*re.findall(r"`(\w+)`", shipped), "failure")), name

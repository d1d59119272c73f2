"""Public evaluation formats → rows. Each is a function of a path that yields plain tables."""

from __future__ import annotations

from luban.core.registry import Registry

FORMATS = Registry(
    "format",
    {
        "lambada": "luban.evals.formats.cloze:lambada",
        "triviaqa": "luban.evals.formats.questions:triviaqa",
        "squad": "luban.evals.formats.questions:squad",
        "coqa": "luban.evals.formats.questions:coqa",
        "wmt": "luban.evals.formats.pairs:wmt",
        "e2e": "luban.evals.formats.pairs:e2e",
        "mmlu": "luban.evals.formats.exams:mmlu",
        "gsm8k": "luban.evals.formats.exams:gsm8k",
        "humaneval": "luban.evals.formats.exams:humaneval",
    },
)

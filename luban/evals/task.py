"""A task measures one model and returns figures and the items behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from luban.core.registry import Registry
from luban.corpus.reader import Document
from luban.load.model import LoadedModel


@dataclass(frozen=True)
class Outcome:
    """Result of a task."""

    figures: dict[str, float]  # the numbers, by name
    items: list[dict[str, Any]] = field(default_factory=list)  # one row an item, for people to judge


@dataclass(frozen=True)
class Material:
    """Held-out documents for tasks: texts and conversations."""

    text: list[Document] = field(default_factory=list)
    conversations: list[Document] = field(default_factory=list)


class Task(Protocol):
    """`run` measures `model` on `material`."""

    needs: str  # the field of Material it reads; "": none

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        """Measure. limit: items at most (0: all)."""
        ...


TASKS = Registry(
    "task",
    {
        "bits_per_byte": "luban.evals.compression:BitsPerByte",
        "answer_loss": "luban.evals.answers:AnswerLoss",
        "which_module": "luban.evals.answers:WhichModule",
        "samples": "luban.evals.answers:Samples",
        "altered_sentence": "luban.evals.altered_sentence:AlteredSentence",
        "needle": "luban.evals.needle:Needle",
        "context_length": "luban.evals.context_length:ContextLength",
        "chomsky": "luban.evals.chomsky.evaluation:Chomsky",
    },
)

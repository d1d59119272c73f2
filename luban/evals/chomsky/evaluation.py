"""`luban eval MODEL chomsky`: accuracy by length of a model that was trained on one of the tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luban.evals.chomsky.protocol import accuracies, read_protocol
from luban.evals.chomsky.tasks import chomsky_task
from luban.evals.task import Material, Outcome
from luban.load.model import LoadedModel


class Chomsky:
    """The task that the model's folder names, at the lengths of its protocol."""

    needs = ""

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        """Accuracy of the answer's tokens; `limit`: rows a length."""
        protocol = read_protocol(Path(model.path))
        protocol = replace(protocol, test_rows=limit or protocol.test_rows)
        (by_length,) = accuracies([model.module], protocol)
        task = chomsky_task(protocol.task)
        figures = {f"chomsky_{protocol.task}": sum(by_length) / len(by_length)}
        base = "transformer" if protocol.model.startswith("transformer") else protocol.model
        if protocol.model in ("transformer", *task.published):
            figures[f"chomsky_{protocol.task}_published"] = task.published[base] / 100
        rows = [{"length": n, "accuracy": share} for n, share in zip(protocol.lengths(), by_length, strict=True)]
        return Outcome(figures, rows)

"""Several tasks over one model: each with its own data, objective and head, sampled by weight (multitask learning, Caruana 1997;
mixing by size with a limit and a temperature, Raffel et al. 2020, section 3.5.2).

[objective]
type = "multitask"
temperature = 2.0

[[objective.tasks]]
name = "text"                               # reads the head of this name, or the model's only one
objective = { type = "causal" }

[[objective.tasks]]
name = "sentiment"
data = "runs/sentiment.shards"              # left out: data.path
weight = 0.2                                # left out: by the number of its rows
objective = { type = "labelled", labels = ["good", "bad"] }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.resuming import Operational
from luban.data.collate.multitask import MultitaskRows, Task, mixing_shares
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch
from luban.objectives.causal import Causal


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task."""

    name: str  # in metrics
    objective: Objective = field(default_factory=Causal)  # what is trained
    data: Operational[str] = ""  # shards; empty: those of data.path
    head: str = ""  # the head that it trains (model.head.type multitask); empty: that of the task's name
    weight: float = 0.0  # relative share of the rows (0: by the number of its rows, as the other tasks then must)
    factor: float = 1.0  # on its loss

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ConfigError(f"a task's name is letters, digits and underscores, {self.name!r} given")
        if self.weight < 0 or not self.factor > 0:
            raise ConfigError(
                f"task {self.name}: weight must be at least 0 and factor above 0, {self.weight} and {self.factor} given"
            )
        if isinstance(self.objective, Multitask):
            raise ConfigError(f"task {self.name} can't be multitask itself: list its tasks beside the others")


@dataclass(frozen=True, kw_only=True)
class Multitask(Objective):
    """Rows of several tasks in every batch; the loss is a mean over all of them."""

    tasks: tuple[TaskConfig, ...] = ()  # at least one
    temperature: float = 1.0  # shares are taken to the power 1/temperature: 1: as they are; higher: more even
    limit: int = 0  # rows of a task that count for its share, at most, where tasks have no weights (0: all)
    # rows: all count the same in the loss, whatever a task's number of targets; targets: all targets do
    average: Literal["rows", "targets"] = "rows"

    varies_rows = True

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"objective.tasks needs one or more tasks of different names, {names} given")
        if len({task.weight > 0 for task in self.tasks}) > 1:
            raise ConfigError("give a weight to every one of objective.tasks, or to none")
        if not self.temperature > 0 or self.limit < 0:
            raise ConfigError(
                f"temperature must be above 0 and limit at least 0, {self.temperature} and {self.limit} given"
            )

    @property
    def bodies(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that every task can train."""
        return tuple(
            body for body in self.tasks[0].objective.bodies if all(body in t.objective.bodies for t in self.tasks)
        )

    @property
    def heads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Several heads, or one that every task can train."""
        first = self.tasks[0].objective.heads
        return ("multitask", *(head for head in first if all(head in t.objective.heads for t in self.tasks)))

    @property
    def two_positions(self) -> bool:  # type: ignore[override]
        """Whether some task's batches have two positions a token."""
        return any(task.objective.two_positions for task in self.tasks)

    def extra_ids(self) -> int:
        """As many as any task needs."""
        return max(task.objective.extra_ids() for task in self.tasks)

    def decoder_start(self, shards: Shards) -> int | None:
        """The one of all tasks. Raises ConfigError where they differ."""
        starts = {task.name: task.objective.decoder_start(shards) for task in self.tasks}
        if len(set(starts.values())) > 1:
            raise ConfigError(
                f"the tasks' targets begin with different tokens ({starts}), and a decoder begins with one"
            )
        return next(iter(starts.values()))

    def require(self, head: Any, *, causal: bool, tied: bool) -> None:
        """Every task has a head that it can train."""
        for task in self.tasks:
            own, objective = head, task.objective
            if self._several(head):
                own = head.named(task.head or task.name)
            elif task.head:
                raise ConfigError(
                    f"task {task.name} names a head, and the model has one: set model.head.type multitask"
                )
            found = own.registry.name_of(type(own))
            if found not in objective.heads:
                name = objective.registry.name_of(type(objective))
                raise ConfigError(
                    f"task {task.name}: objective {name} trains a head {' or '.join(objective.heads)}, not {found}"
                )
            objective.require(own, causal=causal, tied=tied)

    @staticmethod
    def _several(head: Any) -> bool:
        return head.registry.name_of(type(head)) == "multitask"

    def further_data(self) -> dict[str, str]:
        """Shards of the tasks that don't read those of data.path."""
        return {task.name: task.data for task in self.tasks if task.data}

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> MultitaskRows:
        """The tasks' rows, mixed. Raises LineageError for data of another tokenizer than that of data.path."""
        packed = {}
        for task in self.tasks:
            own = shards
            if task.data and Path(task.data) != shards.path:
                own = Shards.open(task.data, shards.split)
                own.require_tokenizer(shards.tokenizer_hash, f"the shards {shards.path} of data.path")
            packed[task.name] = task.objective.examples(own, seq_len=seq_len, seed=seed, packing=packing)
        weights = [task.weight ** (1 / self.temperature) for task in self.tasks]
        if not all(weights):
            sizes = [rows.rows for rows in packed.values()]
            weights = mixing_shares(sizes, limit=self.limit, temperature=self.temperature)
        mixed = [
            Task(name=task.name, packing=packed[task.name], share=share, factor=task.factor)
            for task, share in zip(self.tasks, weights, strict=True)
        ]
        return MultitaskRows(mixed, seed=seed, average=self.average)

    def tasks_of(self, rows: Packing) -> Mapping[str, tuple[float, Packing]]:
        """The share and the rows of each task, of what `examples` gave."""
        assert isinstance(rows, MultitaskRows)
        return rows.alone()

    def measured(self) -> Multitask:
        """Without the tasks' regularisers."""
        return replace(self, tasks=tuple(replace(task, objective=task.objective.measured()) for task in self.tasks))

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The tasks' losses added."""
        parts = {}
        for task in self.tasks:
            parts[task.name] = task.objective.loss(OneHead(model, task.head or task.name), attention)  # type: ignore[arg-type]
        return MultitaskLoss(model, attention, parts=parts)


class OneHead:
    """A model as one task sees it: called, it is the model; its head is the task's. No module, so that parameters are
    registered once, and looked up when it is used, since the trainer may replace them."""

    def __init__(self, model: Any, name: str):
        self.model, self.name = model, name

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """The model's forward."""
        return self.model(*args, **options)

    @property
    def head(self) -> nn.Module:
        """The head of the task, or the only one."""
        heads = getattr(self.model.head, "heads", None)
        return self.model.head if heads is None else heads[self.name]


class MultitaskLoss(LossModule):
    """The sum of the tasks' summed losses, each times its factor; metrics have each task's own loss as `loss/task`.

    Args:
        parts: the loss of each task, whose parameters are the model's.
    """

    parts: dict[str, LossModule]

    def __init__(self, model: nn.Module, attention: AttentionBackend | None, *, parts: Mapping[str, LossModule]):
        super().__init__(model, attention)
        self.__dict__["parts"] = dict(parts)  # unregistered: their parameters are those of `model`

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch. Heads of tasks without rows here have gradients of 0, in every process."""
        total, metrics = None, {}
        for name, part in self.parts.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in batch.items() if key.startswith(f"{name}/")}
            if own:
                found = part(own).sum
                weighted = found * own["factor"][0].to(found.dtype)
                counted = found.detach(), own["loss_mask"].sum()
            else:
                weighted = torch.stack([p.flatten()[0] * 0 for p in part.model.head.parameters()]).sum()
                counted = weighted.detach(), torch.zeros_like(weighted, dtype=torch.int64)
            total = weighted if total is None else total + weighted
            metrics[f"loss/{name}"] = counted
        assert total is not None
        return LossOutput(total, metrics)

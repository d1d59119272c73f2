"""A task as a TOML file says it: where its items come from, how they are asked, how answers are scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from luban.core.config import from_dict, load_toml
from luban.core.errors import ConfigError, UsageError, nearest
from luban.evals.kinds.base import Kind
from luban.evals.names import SHIPPED, shipped_tasks

Chat = Literal["off", "on", "turns"]  # plain text; the chat template around all; each shot as turns of its own


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Items that are made, not read."""

    name: str  # of a generator in `luban.evals.generated`
    items: int = 500  # how many
    seed: int = 0  # what they are drawn from
    words: str = ""  # a text file with the words that are used; empty: a short list that ships

    def __post_init__(self):
        if self.items < 1:
            raise ConfigError(f"items must be at least 1, {self.items} given")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task. Templates are Jinja over the fields of a row; a field's name alone is that field."""

    kind: Kind  # loglikelihood, rolling, generate or judge
    about: str = ""  # what it measures
    source: str = ""  # where its data is published
    version: str = "1"  # counts up when numbers change
    data: str = (
        ""  # .jsonl, .json, .csv or .parquet file, a Luban corpus, or a folder with SPLIT.jsonl; beside the task file
    )
    split: str = ""  # of a corpus or a folder
    format: str = "rows"  # public format that the data is in (`luban.evals.formats`)
    generated: Generated | None = None  # in the place of data
    items: tuple[dict[str, Any], ...] = ()  # rows in the file itself, in the place of data
    id: str = ""  # template of an item's name; empty: its number
    prompt: str = ""  # template of what is asked
    target: str = ""  # template of the right answer, or of a list of them; with choices: their number, letter or text
    description: str = ""  # text before everything; in chats the system message
    target_delimiter: str = " "  # between prompt and answer, in text
    shot_delimiter: str = "\n\n"  # behind each shot, in text
    shots: int = 0  # worked examples before each item
    shot_data: str = ""  # where they come from; empty: the items themselves, never the one that is asked
    shot_split: str = ""  # of a corpus or a folder
    shot_order: Literal["drawn", "first"] = "drawn"  # by seed for each item, or the first ones for all
    fixed_shots: tuple[dict[str, Any], ...] = ()  # rows that are the shots, in this order
    repeats: int = 1  # answers to each item; above 1 they are sampled
    group_by: str = ""  # field whose values get figures of their own
    same_by: str = (
        ""  # field that rephrasings of one question share: how often scores differ among them becomes `flips`
    )

    def __post_init__(self):
        if self.shots < 0 or self.repeats < 1:
            raise ConfigError(f"shots must be at least 0 and repeats at least 1, {self.shots} and {self.repeats} given")
        if sum(map(bool, (self.data, self.generated, self.items))) > 1:
            raise ConfigError("a task has data, generated items or items of its own, and only one of them")
        self.kind.check(self)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task by name, with the folder that its paths are seen from."""

    name: str
    spec: TaskSpec
    folder: Path

    def path(self, name: str) -> Path:
        """A file that the task names."""
        return Path(name) if Path(name).is_absolute() else self.folder / name


def load_tasks(name: str, data: str = "") -> list[Task]:
    """The tasks behind a name: a shipped one, a .toml file, or the .yaml file of lm-evaluation-harness. A file with
    `tasks = […]` is a group of them.

    Args:
        data: a path that takes the place of the task's own data.

    Raises:
        UsageError: no such task. ConfigError: a file that isn't right; names it and the field.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        from luban.evals.lm_eval_yaml import read_yaml

        return [_with_data(read_yaml(path), data)]
    if path.suffix != ".toml":
        path = SHIPPED / f"{name}.toml"
        if not path.is_file():
            from luban.evals.task import TASKS

            known = [*TASKS.entries, "checklist", *shipped_tasks()]
            raise UsageError(
                f"unknown task '{name}'{nearest(name, known)}; a task is a name that ships, a .toml or a .yaml file"
            )
    table = load_toml(path, SHIPPED)
    if "tasks" in table:
        members = table.pop("tasks")
        if table.keys() - {"about"} or not isinstance(members, list):
            raise ConfigError(f"{path}: a group of tasks has the fields tasks and about")
        return [task for member in members for task in load_tasks(_beside(path, str(member)), data)]
    try:
        spec = from_dict(TaskSpec, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return [_with_data(Task(name=path.stem, spec=spec, folder=path.parent), data)]


def _beside(group: Path, member: str) -> str:
    return str(group.parent / member) if (group.parent / member).is_file() else member


def _with_data(task: Task, data: str) -> Task:
    if not data:
        return task
    if task.spec.generated or task.spec.items:
        raise UsageError(f"the task {task.name} has items of its own: leave --data out")
    parts = [data] if Path(data).exists() else data.split("+")  # a format may read several files
    return replace(task, spec=replace(task.spec, data="+".join(str(Path(part).absolute()) for part in parts)))

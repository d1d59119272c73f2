"""The checkpoints of one run: which to keep, and which to resume from."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from luban.checkpoint.reader import CheckpointReader
from luban.core.errors import ArtifactError
from luban.core.log import warn
from luban.core.resuming import Operational
from luban.core.whole_directory import INCOMPLETE

T = TypeVar("T")
FOLDER = "checkpoints"
NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    every: Operational[int] = 100  # steps between checkpoints; the last step is always saved
    keep: Operational[int] = 2  # newest checkpoints kept, beside the best

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, {self.every} given")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, {self.keep} given")


class Processes(Protocol):
    """Those that read a checkpoint together, as one of them sees them."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...

    def agree(self, value: T) -> T:
        """The main process's value, in every process."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in every process."""
        ...


class OneProcess:
    """A process that reads alone."""

    rank, size, is_main = 0, 1, True

    def agree(self, value: T) -> T:
        """The value."""
        return value

    def gather(self, value: T) -> list[T]:
        """The value."""
        return [value]


class CheckpointManager:
    """The folder `RUN/checkpoints`: what to keep and what to resume from."""

    def __init__(self, run: Path):
        self.folder = Path(run) / FOLDER

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint directory, ascending."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def keep(self, newest: int, best: int | None) -> None:
        """Delete all but the `newest` last checkpoints and the best."""
        for step in self.steps()[:-newest]:
            if step != best:
                remove_directory(self.path(step))

    def remove_unfinished(self) -> None:
        """Delete what a crash left half-written."""
        if self.folder.is_dir():
            for leftover in self.folder.glob(f"*{INCOMPLETE}"):
                remove_directory(leftover)

    def resume(self, processes: Processes | None = None) -> tuple[int, CheckpointReader] | None:
        """The newest whole checkpoint and its step; nothing when there is none.

        All processes of a run call it together, and each verifies a share of the tensors. A damaged checkpoint is named in a
        warning and removed, since training writes that step again; what a crash left half-written is removed too.
        """
        together = processes or OneProcess()
        if together.is_main:
            self.remove_unfinished()
        for step in reversed(together.agree(self.steps())):
            reader, problem = None, None
            try:
                reader = CheckpointReader.open(self.path(step))
                reader.verify(together.rank, together.size)
            except ArtifactError as error:
                problem = str(error)
            found = next((each for each in together.gather(problem) if each), None)
            if found is None and reader is not None:
                return step, reader
            warn(f"{found}; resuming from the checkpoint before it")
            if together.is_main:
                remove_directory(self.path(step))
        return None


def remove_directory(path: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that passes for one."""
    doomed = path if path.name.endswith(INCOMPLETE) else path.with_name(path.name + INCOMPLETE)
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)

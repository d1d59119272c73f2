"""Commands side by side, each with a GPU to itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Command = Sequence[Any]


@dataclass(frozen=True)
class Job:
    """Commands that run one after another on one GPU."""

    name: str
    commands: Sequence[Command]


def visible(count: int) -> list[str]:
    """The first of the GPUs that this process may see, as CUDA_VISIBLE_DEVICES names them."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return seen.split(",")[:count]


def side_by_side(jobs: Sequence[Job], count: int, logs: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(name, exit status, printed lines) of every job as it ends: of its last command, or of the first that failed.

    Args:
        count: of GPUs. logs: a folder for what each command prints, errors included.
    """
    waiting, running = list(jobs), {}
    while waiting or running:
        for gpu in visible(count):
            if gpu not in running and waiting:
                running[gpu] = _started(waiting.pop(0), 0, gpu, logs)
        for gpu, (job, step, process, log) in list(running.items()):
            if process.poll() is None:
                continue
            del running[gpu]
            if process.returncode == 0 and step + 1 < len(job.commands):
                running[gpu] = _started(job, step + 1, gpu, logs)
                continue
            log.seek(0)
            yield job.name, process.returncode, log.read().strip().splitlines()
        time.sleep(0.2)


def _started(job: Job, step: int, gpu: str, logs: Path) -> tuple[Job, int, subprocess.Popen, IO[str]]:
    log = (logs / f"{job.name}-{step}.log").open("w+")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
    command = [str(part) for part in job.commands[step]]
    return job, step, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log

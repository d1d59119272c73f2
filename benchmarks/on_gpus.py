"""Commands side by side, each with a GPU to itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

Command = Sequence[Any]


Job = dict[str, Command]  # commands by name, that run one after another on one GPU: what is compared shares a chip


def visible(count: int) -> list[str]:
    """The first of the GPUs that this process may see, as CUDA_VISIBLE_DEVICES names them."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return seen.split(",")[:count]


def side_by_side(jobs: Sequence[Job], count: int, logs: Path) -> Iterator[tuple[str, int, list[str]]]:
    """(name, exit status, printed lines) of every command as it ends.

    Args:
        count: of GPUs. logs: a folder for what each command prints, errors included.
    """
    waiting, running = [list(job.items()) for job in jobs], {}
    while waiting or running:
        for gpu in visible(count):
            if gpu not in running and waiting:
                running[gpu] = _started(waiting.pop(0), gpu, logs)
        for gpu, (name, process, log, rest) in list(running.items()):
            if process.poll() is None:
                continue
            del running[gpu]
            if rest:
                running[gpu] = _started(rest, gpu, logs)
            log.seek(0)
            yield name, process.returncode, log.read().strip().splitlines()
        time.sleep(0.2)


def _started(commands: list[tuple[str, Command]], gpu: str, logs: Path) -> tuple[str, subprocess.Popen, IO[str], list]:
    (name, command), *rest = commands
    log = (logs / f"{name}.log").open("w+")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=environment)
    return name, process, log, rest

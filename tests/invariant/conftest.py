"""The command line, and shards and a recipe small enough to train in a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import warm
from training_data import make_shards

RECIPE = """
[model]
width = 32
layers = 2
context = 64
tied_head = true
layer = { mixer = { type = "grouped", heads = 2, kv_heads = 1 }, feedforward = { type = "swiglu", width = 48 } }

[schedule]
warmup = 5

[train]
steps = 60
batch_size = 4
seq_len = 32
device = "cpu"
log_every = 1

[checkpoint]
every = 4

[validation]
every = 20
batches = 1
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


def _listen() -> None:
    """Signals as a terminal starts a command with; a shell starts background jobs with Ctrl-C ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def start():
    """`start("pretrain", …)` is the running command; its streams are text.

    `signalled=(step, calls, number)` sends it the signal `number` so many function calls after that step was logged.
    """
    running = []

    def run(
        *words,
        signalled: tuple[int, int, int] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        **popen,
    ) -> subprocess.Popen:
        program = [Path(__file__).with_name("signalled.py"), *map(int, signalled)] if signalled else ["-m", "luban"]
        command = [sys.executable, *map(str, program), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        running.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                **{"preexec_fn": _listen, **popen},
            )
        )
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def luban():
    """`luban("pretrain", …)` runs a command to its end: (exit code, standard error)."""

    def run(*words, **options) -> tuple[int, str]:
        done = warm.command(*words, **options)
        return done.returncode, done.stderr

    return run

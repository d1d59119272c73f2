"""`luban WORDS`, or a test's function, in processes that need not import torch again: they are forked from one that has.

Everything but the imports is as in a terminal. What depends on imports or on how Python was started runs `python -m luban`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.multiprocessing import start_processes

PRELOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "luban.cli.main",
    "luban.train.run",
    "luban.serve.engine",
    "luban.load.export",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def command(
    *words: object,
    input: str = "",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    file_size: int | None = None,
) -> subprocess.CompletedProcess:
    """Run a command to its end and return what `subprocess.run` would; `environment` replaces this process's. Writing a file
    beyond `file_size` bytes fails as on a full disk."""
    given = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")]
        Path(streams[0]).write_text(input)
        place = str(cwd or Path.cwd())
        process = _context.Process(
            target=_run, args=(given, streams, place, dict(environment or os.environ), file_size)
        )
        process.start()
        process.join()
        written = [Path(stream).read_text() for stream in streams[1:]]
    return subprocess.CompletedProcess(given, process.exitcode, *written)


def processes(function: Callable[..., None], count: int, *arguments: object) -> None:
    """`function(rank, *arguments)` in `count` processes; the first that fails raises here."""
    start_processes(function, arguments, nprocs=count, start_method="forkserver")


class Child:
    """`python WORDS` as `subprocess.Popen` shows a process; what it prints is added to `log`."""

    stdin = None

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path):
        assert words[0] == "-m"
        self._process = _context.Process(target=_run_module, args=(list(words[1:]), dict(environment), str(log)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: it runs."""
        return self._process.exitcode


def _run_module(words: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    module, *sys.argv[1:] = words
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _run(words: list[str], streams: list[str], place: str, environment: dict[str, str], file_size: int | None) -> None:
    for number, stream in enumerate(streams):
        descriptor = os.open(stream, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # multiprocessing gives its processes none
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["luban", *words]
    if file_size is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from luban.cli.main import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()

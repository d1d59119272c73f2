"""Python code that a model wrote, run in a process of its own with limits on time, memory and files.

The process is isolated from Python's user packages and the environment, not from the file system or the network: run the code
of a model that isn't trusted in a container.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
MEMORY = 1 << 30  # bytes that the process may take
WRITTEN = 1 << 24  # bytes of a file that it may write


def code_of(text: str) -> str:
    """The code in an answer's fenced blocks, or the whole answer where it has none."""
    return "\n".join(CODE.findall(text)) or text


def passes(code: str, tests: str, timeout: float) -> bool:
    """True if `code` and then `tests` run to the end without an error within `timeout` seconds."""
    passed = secrets.token_hex(8)  # printed behind the tests; the code can't know it beforehand
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", f"{code}\n\n{tests}\nprint('{passed}', end='')"],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=printed,  # a file, whose size is limited
                stderr=subprocess.DEVNULL,
                preexec_fn=lambda: _limit(timeout),
                start_new_session=True,
            )
        except ValueError:  # a NUL character in the code
            return False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            process.wait()
        printed.seek(0)
        return process.returncode == 0 and printed.read().endswith(passed.encode())


def _limit(timeout: float) -> None:
    seconds = max(1, int(timeout) + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))

"""A server of a model on this machine, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from luban.core.errors import DataError

ADDRESS = re.compile(r"serving .*? at (http://\S+)")


@contextmanager
def served(model: str, flags: Sequence[str]) -> Iterator[str]:
    """`luban serve MODEL …` while the block runs; gives its address. Raises DataError, with what it said, where it ends."""
    environment = {name: value for name, value in os.environ.items() if name != "LUBAN_API_KEY"}
    command = [sys.executable, "-m", "luban", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line.strip())
            if found := ADDRESS.search(line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1]
                return
        raise DataError(f"the server of {model} ended: {said[-1] if said else 'it said nothing'}")
    finally:
        process.terminate()
        process.wait()

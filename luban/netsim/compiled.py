"""Compilation of the event loop by numba, and where the machine code is kept.

numba's own cache looks only at the file of the function that it compiles: after an edit of a congestion-control algorithm it
would go on running the old one. Here the folder's name is a hash of every source file that can end up in the machine code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from luban.core.errors import MissingExtra

try:
    import numba
except ModuleNotFoundError:
    raise MissingExtra("numba", "plan", "The network simulator") from None

F = TypeVar("F", bound=Callable)
KEPT = 4  # versions of the sources whose machine code stays on the disk


def compiled(function: F) -> F:
    """Compile `function` when it is first called. Functions called by others are compiled into their callers."""
    options = {
        "error_model": "numpy",
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
    }  # halves the time to compile
    return numba.njit(function, **options)  # type: ignore[return-value]


def cached(function: F) -> F:
    """As `compiled`, and keep the machine code for other processes: for the few functions that Python calls."""
    dispatcher = numba.njit(function, error_model="numpy", boundscheck=False, nogil=True)
    folder = cache_folder()
    if folder is not None:
        before = numba.config.CACHE_DIR  # type: ignore[attr-defined]
        numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
        try:
            dispatcher.enable_caching()
        finally:
            numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
    return dispatcher  # type: ignore[return-value]


@functools.cache
def cache_folder() -> Path | None:
    """The folder for the machine code of these sources, made if need be; None where no folder can be written."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted(
        [here / "compiled.py", *here.glob("fluid*.py"), *here.glob("engine/*.py"), *here.glob("congestion/*.py")]
    ):
        digest.update(file.read_bytes())
    for root in (_user_cache() / "luban" / "netsim", Path(tempfile.gettempdir()) / f"luban-netsim-{os.getuid()}"):
        folder = root / digest.hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError:
            continue
        os.utime(folder)
        _drop_old(root, folder)
        return folder
    return None


def is_cached(function: Callable) -> bool:
    """Whether the machine code of a `cached` function lies in the folder already."""
    folder = cache_folder()
    return folder is not None and any(folder.rglob(f"*.{function.__name__}-*.nbi"))


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path.home() / ".cache"


def _drop_old(root: Path, used: Path) -> None:
    """Keep `used` and the newest others; clocks of file systems tick coarsely, so that `used` needn't be the newest."""
    others = [p for p in root.iterdir() if p.is_dir() and p != used]
    others.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in others[KEPT - 1 :]:
        shutil.rmtree(folder, ignore_errors=True)

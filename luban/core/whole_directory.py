"""Directories that appear whole or not at all: written as `NAME.incomplete` and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import ArtifactError

INCOMPLETE = ".incomplete"


def real_path(path: str | Path) -> Path:
    """Where the directory `path` lies, behind symbolic links: a finished directory can't be renamed onto a link."""
    path = Path(path)
    return path.resolve() if path.is_symlink() or path.name in ("", "..") else path


def incomplete_path(path: str | Path) -> Path:
    """Where the directory at `path` is while it is being written."""
    path = real_path(path)
    return path.parent / (path.name + INCOMPLETE)  # of the root, too, which has no name


def require_vacant(out: Path) -> None:
    """Raise ArtifactError unless nothing is at `out`, or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} already exists and is not empty: choose another directory, or remove it")


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Write a directory that isn't an artifact whole or not at all: yields the `.incomplete` directory to write into, which is
    renamed to `out` at the end and removed after an exception. Raises ArtifactError unless `out` is vacant."""
    require_vacant(out)
    out = real_path(out)
    partial = incomplete_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def put_in_place(finished: Path, out: Path) -> None:
    """Rename a finished directory to `out`, where nothing but an empty directory may be."""
    if out.is_dir():
        out.rmdir()
    os.rename(finished, out)

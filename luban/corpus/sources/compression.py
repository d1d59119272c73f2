"""Compressed files, detected by file extension: gzip, bzip2, xz and Zstandard."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from luban.corpus.arrow import require_pyarrow

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what reading a damaged file raises


def _zstd(path: Path) -> BinaryIO:
    pyarrow, _ = require_pyarrow("reading .zst files")
    return io.BufferedReader(pyarrow.CompressedInputStream(open(path, "rb"), "zstd"))


OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


def is_compressed(path: Path) -> bool:
    """True if the file extension is that of a compressed file."""
    return path.suffix.lower() in OPENERS


def plain_name(path: Path) -> str:
    """The file's name in lower case, without the ending of its compression."""
    return (path.stem if is_compressed(path) else path.name).lower()


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where its name says that it is compressed."""
    return OPENERS[path.suffix.lower()](path) if is_compressed(path) else open(path, "rb")

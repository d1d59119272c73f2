"""Plain data as JSON, and content hashes: of bytes on disk, and of plain data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luban import __version__


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(data: Any) -> Any:
    """Plain data with None for NaN and infinities, for which JSON has no number."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def canonical(data: Any) -> bytes:
    """Plain data as JSON bytes that do not depend on key order or spacing."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def data_sha256(data: Any) -> str:
    """SHA-256 of plain data, in hex."""
    return hashlib.sha256(canonical(data)).hexdigest()


def code_version() -> str:
    """Luban's version, and a hash of its source as it is on this machine."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{__version__} ({digest.hexdigest()[:12]})"

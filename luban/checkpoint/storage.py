"""Safetensors files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from luban.core.errors import DataError


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a safetensors file with the permissions that the umask gives to new files.

    `safetensors` (0.8) itself replaces the file by one with mode 0600, which no other user and no container can read.

    Raises:
        DataError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
        os.chmod(path, stat.S_IMODE(mode))
    except (SafetensorError, OSError) as error:  # the library hides the system's error inside its own
        raise DataError(f"cannot write {path}: {error}: free some space or choose another --out") from error

"""How a checkpoint's named tensors reach the disk: the one seam that a sharded writer replaces.

`Storage` knows nothing of training. `SafetensorsStorage` writes each collection as one file from one
process; a writer that plans shards over ranks has the same two methods.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luban.core.errors import ArtifactError, DataError


class Storage(Protocol):
    """Writes and reads collections of named tensors inside one checkpoint directory."""

    def write(self, directory: Path, collection: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Write one collection, such as "model"."""
        ...

    def read(self, directory: Path, collection: str, device: str = "cpu") -> dict[str, Tensor]:
        """Read one collection back, bit for bit."""
        ...


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


class SafetensorsStorage:
    """One safetensors file a collection."""

    def write(self, directory: Path, collection: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        write_safetensors(whole, directory / f"{collection}.safetensors", metadata)

    def read(self, directory: Path, collection: str, device: str = "cpu") -> dict[str, Tensor]:
        path = directory / f"{collection}.safetensors"
        try:
            return load_file(path, device=device)
        except (SafetensorError, FileNotFoundError) as error:
            raise ArtifactError(f"{path} is not a whole safetensors file: {error}") from error

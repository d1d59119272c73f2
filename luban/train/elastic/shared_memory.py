"""Where copies of a run's state lie in memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from luban.core.errors import ConfigError
from luban.core.whole_directory import real_path
from luban.train.elastic.config import FLASH_FOLDER


def flash_root(folder: str) -> Path:
    """The folder that the copies of all runs lie in: `folder`, or the system's folder for temporary files where the default does
    not exist. Raises ConfigError where another one does not."""
    if Path(folder).is_dir():
        return Path(folder)
    if folder != FLASH_FOLDER:
        raise ConfigError(f"elastic.flash_folder {folder} is not a folder: make it, or give another")
    return Path(tempfile.gettempdir())


def flash_base(folder: str, out: Path) -> Path:
    """The folder of a run's copies below `flash_root`, private to the user.

    Raises ConfigError where the root doesn't exist, or somebody else has taken the folder's name.
    """
    root = flash_root(folder)
    digest = hashlib.sha256(str(real_path(out).resolve()).encode()).hexdigest()[:12]
    base = root / f"luban-{os.getuid()}-{digest}"
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise ConfigError(f"{base} belongs to another user: give another --elastic.flash_folder")
    return base


def neighbour(rank: int, nodes: Sequence[str]) -> str:
    """The node that keeps a second copy of a worker's state: that of the next worker on another node; its own where there is
    one node.

    Args:
        nodes: of all workers by rank.
    """
    after = [*nodes[rank + 1 :], *nodes[: rank + 1]]
    return next((node for node in after if node != nodes[rank]), nodes[rank])


def remove_flash(base: Path, node: str | None = None) -> None:
    """Free the memory of all copies of a run, or of those of one node. Raises ValueError for a folder that isn't right below the
    base."""
    folder = base if node is None else base / node
    if node is not None and Path(os.path.normpath(folder)).parent != Path(os.path.normpath(base)):
        raise ValueError(f"{folder} is no folder of a node below {base}")
    shutil.rmtree(folder, ignore_errors=True)

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


def flash_base(folder: str, out: Path) -> Path:
    """The folder of a run's copies, private to the user; below the system's folder for temporary files where `folder` is none.

    Raises ConfigError where somebody else has taken its name.
    """
    root = Path(folder) if Path(folder).is_dir() else Path(tempfile.gettempdir())
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


def remove_flash(base: Path) -> None:
    """Free the memory of all copies of a run."""
    shutil.rmtree(base, ignore_errors=True)

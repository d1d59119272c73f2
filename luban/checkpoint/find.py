"""From a name that a person typed to the checkpoint they meant."""

from __future__ import annotations

from pathlib import Path

from luban.checkpoint.series import Series
from luban.core.artifact import incomplete_path, read_manifest
from luban.core.errors import ArtifactError


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory behind a checkpoint, a finished run, or an unfinished one (its last).

    Raises:
        ArtifactError: it is neither, or the run has not saved one yet.
    """
    path = Path(path)
    if not path.exists() and incomplete_path(path).is_dir():
        path = incomplete_path(path)
    manifest = read_manifest(path)
    if manifest.kind == "checkpoint":
        return path
    if manifest.kind != "run":
        raise ArtifactError(f"{path} is a {manifest.kind}, but a run or a checkpoint is needed here")
    series = Series(path)
    if not series.steps():
        raise ArtifactError(f"{path} holds no checkpoint yet")
    return series.path(series.steps()[-1])

"""Save and load one training checkpoint.

A checkpoint is an artifact of kind "checkpoint": `spec.json` (the model's description),
`model.safetensors` (fp32 weights), `optimizer.safetensors`, `random.safetensors` (generator states) and
`state.json` (step, tokens, loss scale, loader position, …). It is written as `NAME.incomplete` and
renamed when whole; every file is hashed in its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from luban.checkpoint.storage import SafetensorsStorage, Storage
from luban.checkpoint.weights import weights_hash
from luban.core.artifact import ArtifactWriter, Manifest, Parent, open_artifact, write_json
from luban.core.errors import ArtifactError

KIND = "checkpoint"
STORAGE = SafetensorsStorage()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that training needs to go on as if it had never stopped."""

    spec: dict[str, Any]  # the model's description, as in spec.json
    model: Mapping[str, Tensor]  # parameter name → full fp32 tensor
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)  # `parameter/key` → tensor
    random: Mapping[str, Tensor] = field(default_factory=dict)  # generator → its state, uint8
    state: dict[str, Any] = field(default_factory=dict)  # counters and settings, plain data
    figures: dict[str, Any] = field(default_factory=dict)  # measured, such as seconds: in the manifest, not hashed


def save_checkpoint(
    path: Path,
    checkpoint: Checkpoint,
    *,
    config: dict[str, Any] | None = None,
    parents: tuple[Parent, ...] = (),
    seed: int | None = None,
    storage: Storage = STORAGE,
) -> Manifest:
    """Write a whole checkpoint at `path`, or nothing.

    Returns:
        Its manifest, whose figures are the checkpoint's and `weights_hash`, which identifies the weights.

    Raises:
        ArtifactError: `path` is occupied.
        DataError, OSError: the disk refused.
    """
    with ArtifactWriter(path, kind=KIND, config=config, parents=parents, seed=seed) as art:
        write_json(art.path / "spec.json", checkpoint.spec)
        write_json(art.path / "state.json", checkpoint.state)
        storage.write(art.path, "model", checkpoint.model, {})
        for collection in ("optimizer", "random"):
            tensors = getattr(checkpoint, collection)
            if tensors:
                storage.write(art.path, collection, tensors, {})
        art.figures.update(checkpoint.figures, weights_hash=weights_hash(checkpoint.model))
    return art.manifest


def load_checkpoint(path: Path, *, storage: Storage = STORAGE, device: str = "cpu") -> Checkpoint:
    """Read a checkpoint back, every file verified against its manifest first.

    Raises:
        ArtifactError: it is unfinished, truncated or edited; the message names the file.
    """
    manifest = open_artifact(path, KIND)
    collections = {
        name: storage.read(path, name, device) if f"{name}.safetensors" in manifest.files else {}
        for name in ("model", "optimizer", "random")
    }
    if weights_hash(collections["model"]) != manifest.figures.get("weights_hash"):
        raise ArtifactError(f"{path} is damaged: its weights do not have the weights_hash of its manifest")
    return Checkpoint(
        spec=_read_json(path / "spec.json"),
        state=_read_json(path / "state.json"),
        figures=manifest.figures,
        **collections,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error

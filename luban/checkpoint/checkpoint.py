"""What a checkpoint holds.

A checkpoint is an artifact of kind "checkpoint": `spec.json` (the model's description), `state.json` (step, tokens, loss scale,
loader position, …), `index.json` (which file holds which piece of which tensor, and its hash) and safetensors files of the
collections model (fp32 weights), optimizer and random (generator states): `model.safetensors` from one process,
`model-00001-of-00004.safetensors` and so on from four. It is written as `NAME.incomplete` and renamed when it has been read
back whole; every file is hashed in its manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from luban.checkpoint.reader import COLLECTIONS, CheckpointReader
from luban.checkpoint.weights import weights_hash
from luban.core.errors import ArtifactError
from luban.nn.init import Region

Parts = Mapping[str, Tensor | Region]  # by name: whole tensors, or the parts that this process has


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that training needs to go on as if it had never stopped, or one process's parts of it."""

    spec: dict[str, Any]  # the model's description, as in spec.json
    model: Parts  # parameter name → full fp32 tensor
    optimizer: Parts = field(default_factory=dict)  # `parameter/key` → tensor
    random: Parts = field(default_factory=dict)  # generator → its state, uint8
    state: dict[str, Any] = field(default_factory=dict)  # counters and settings, plain data
    figures: dict[str, Any] = field(default_factory=dict)  # measured, such as seconds: in the manifest, not hashed

    def regions(self) -> dict[str, dict[str, Region]]:
        """Collection → name → the parts that are here."""
        return {collection: {n: _region(t) for n, t in getattr(self, collection).items()} for collection in COLLECTIONS}


def _region(tensor: Tensor | Region) -> Region:
    return tensor if isinstance(tensor, Region) else Region(tuple(tensor.shape), [(tensor, (0,) * tensor.dim())])


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint back, every tensor verified.

    Raises:
        ArtifactError: it is unfinished, truncated or edited; the message names the file.
    """
    reader = CheckpointReader.open(path)
    collections = {name: dict(reader.tensors(name)) for name in COLLECTIONS}
    found = Checkpoint(spec=reader.spec, state=reader.state, model={}, figures=reader.manifest.figures)
    if weights_hash(collections["model"]) != reader.manifest.figures.get("weights_hash"):
        raise ArtifactError(f"{path} is damaged: its weights do not have the weights_hash of its manifest")
    return replace(found, **collections)

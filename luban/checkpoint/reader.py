"""A checkpoint on disk, read piece by piece: a process takes what it needs and never holds the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luban.checkpoint.index import INDEX, Entry, Index, Piece, entries_of, read_index
from luban.checkpoint.weights import tensor_sha256
from luban.core.artifact import Manifest, open_artifact, read_table
from luban.core.errors import ArtifactError

KIND = "checkpoint"
COLLECTIONS = ("model", "optimizer", "random")
WHOLE = "{}.safetensors"  # a collection's file, where one process saved it


class CheckpointReader:
    """An open checkpoint. Every piece is hashed when it is read.

    Args:
        path: the checkpoint's directory.
        manifest, index: of it.
    """

    def __init__(self, path: Path, manifest: Manifest, index: Index):
        self.path, self.manifest, self.index = path, manifest, index
        self._files: dict[str, Any] = {}
        self._last: tuple[Piece, Tensor] | None = None  # read for several regions, one after the other

    @classmethod
    def open(cls, path: Path) -> CheckpointReader:
        """Open a checkpoint; one without an index, as they were written before there was one, has every file hashed.

        Raises:
            ArtifactError: it is unfinished, or a file is missing, truncated or, as far as it was read, edited.
        """
        if (path / INDEX).is_file():
            manifest = open_artifact(path, KIND, verify=(INDEX, "spec.json", "state.json"))
            return cls(path, manifest, read_index(path))
        manifest = open_artifact(path, KIND)
        if INDEX in manifest.files:
            raise ArtifactError(f"{path} is damaged: {INDEX} is missing")
        names = [name for name in COLLECTIONS if (path / WHOLE.format(name)).is_file()]
        return cls(path, manifest, {name: _whole_file(path, WHOLE.format(name)) for name in names})

    @property
    def spec(self) -> dict[str, Any]:
        """The model's description."""
        return read_table(self.path / "spec.json")

    @property
    def state(self) -> dict[str, Any]:
        """Counters and settings."""
        return read_table(self.path / "state.json")

    def entries(self, collection: str) -> Mapping[str, Entry]:
        """The tensors of a collection."""
        return self.index.get(collection, {})

    def read(self, collection: str, name: str, begin: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A rectangle of a tensor, on the CPU. Raises ArtifactError naming the tensor and file that are damaged."""
        entry = self.entries(collection).get(name)
        if entry is None:
            raise ArtifactError(f"{self.path} lacks the tensor {name} of {collection}")
        found = torch.empty(tuple(shape), dtype=getattr(torch, entry.dtype))
        if len(begin) != len(entry.shape):
            raise ArtifactError(
                f"{self.path}: the tensor {name} has shape {entry.shape}, which the model has no place for"
            )
        for piece in entry.pieces:
            overlap = piece.overlap(begin, shape)
            if overlap is not None:
                here, there = overlap
                found[there] = self._piece(name, piece)[here]
        return found

    def whole(self, collection: str, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.entries(collection)[name].shape
        return self.read(collection, name, (0,) * len(shape), shape)

    def tensors(self, collection: str) -> StoredTensors:
        """Whole tensors by name, each read when it is asked for."""
        return StoredTensors(self, collection)

    def verify(self, rank: int = 0, ranks: int = 1) -> None:
        """Read and hash every `ranks`-th piece, so that as many processes together check all. Raises ArtifactError."""
        pieces = [(name, piece) for _, name, entry in entries_of(self.index) for piece in entry.pieces]
        for name, piece in pieces[rank::ranks]:
            self._piece(name, piece)

    def _piece(self, name: str, piece: Piece) -> Tensor:
        if self._last is not None and self._last[0] == piece:
            return self._last[1]
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(self.path / piece.file, framework="pt")
            tensor = self._files[piece.file].get_tensor(piece.key)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.path} is damaged: {piece.file}, which holds {name}: {error}") from error
        if tuple(tensor.shape) != piece.shape or piece.sha256 not in (None, tensor_sha256(tensor)):
            raise ArtifactError(f"{self.path} is damaged: {name} in {piece.file} is not what was saved")
        self._last = piece, tensor
        return tensor


class StoredTensors(Mapping[str, Tensor]):
    """The whole tensors of a collection, each read when it is asked for and kept by nobody."""

    def __init__(self, reader: CheckpointReader, collection: str):
        self.reader, self.collection = reader, collection

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.reader.entries(self.collection):
            raise KeyError(name)
        return self.reader.whole(self.collection, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.entries(self.collection))

    def __len__(self) -> int:
        return len(self.reader.entries(self.collection))

    def described(self) -> dict[str, Tensor]:
        """On the meta device: shapes and dtypes, without reading."""
        entries = self.reader.entries(self.collection).items()
        return {name: torch.empty(e.shape, dtype=getattr(torch, e.dtype), device="meta") for name, e in entries}


def _whole_file(path: Path, file: str) -> dict[str, Entry]:
    """The tensors of a file that holds them whole."""
    found = {}
    try:
        with safe_open(path / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                dtype = str(opened.get_tensor(name).dtype if not shape else part[:0].dtype).removeprefix("torch.")
                found[name] = Entry(dtype, shape, (Piece(file, name, (0,) * len(shape), shape),))
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged: {file} is not a whole safetensors file: {error}") from error
    return found

"""Copies of the training state in shared memory ("flash checkpoints"), from which a run goes on when a worker is lost.

Every worker keeps what it holds of the last two step boundaries in a file of a file system in memory, so that it outlives the
worker. Where there are several nodes, a second copy lies in the folder of the next one. A copy counts once its header is
written, which happens last; one of two always is whole.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.index import Entry, Piece
from luban.checkpoint.reader import CheckpointReader
from luban.core.artifact import Manifest, atomic_write
from luban.core.log import warn
from luban.core.units import bytes_

HEADER = 1 << 16  # bytes before the data of each of the two copies
ALIGNED = 64  # bytes
SUFFIX = ".flash"


class Row(NamedTuple):
    """A piece of a tensor in a file."""

    collection: str
    name: str
    dtype: str  # torch's name
    whole: tuple[int, ...]  # shape of the tensor
    begin: tuple[int, ...]  # index in it of the piece's first number
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the copy


Layout = list[Row]


@dataclass(frozen=True)
class Owner:
    """Whose copy a file holds."""

    generation: int
    rank: int
    size: int  # workers of the generation


@dataclass
class FlashMemory:
    """What one worker keeps.

    Args:
        folders: of its node, and of the node that keeps a second copy.
    """

    folders: list[Path]
    owner: Owner
    files: list[_File] = field(default_factory=list)
    layout: Layout = field(default_factory=list)
    written: int = 0  # copies so far
    enough_memory: bool = True

    def write(self, checkpoint: Checkpoint, step: int) -> None:
        """Keep the state after a step; the copy before the last one is overwritten."""
        pieces = list(_pieces(checkpoint))
        layout, size = _layout(pieces)
        if layout != self.layout:
            self._allocate(layout, size)
        if not self.enough_memory:
            return
        header = {
            "step": step,
            "state": checkpoint.state,
            "figures": {name: value for name, value in checkpoint.figures.items() if name == "seconds"},
        }
        for file in self.files:
            file.write(self.written % 2, header, [tensor for *_, tensor in pieces])
        self.written += 1
        if self.written == 2:  # every worker of this generation has a copy now
            for folder in self.folders:
                _remove_older(folder, self.owner.generation)

    def _allocate(self, layout: Layout, size: int) -> None:
        """Make the files; where memory is short, without the copies of earlier generations, from which every worker has restored
        its state before anyone's first step."""
        self.layout = layout
        try:
            self.files = self._create(layout, size)
            return
        except OSError:
            for folder in self.folders:
                _remove_older(folder, self.owner.generation)
            gc.collect()  # memory is free only when nothing maps the files
        try:
            self.files = self._create(layout, size)
        except OSError as error:
            self.enough_memory = False
            warn(
                f"not enough memory for copies of the state in {self.folders[0]} ({bytes_(2 * (HEADER + size))} a worker: "
                f"{error.strerror}): a lost worker costs the steps since the last checkpoint; give another "
                f"--elastic.flash_folder"
            )

    def _create(self, layout: Layout, size: int) -> list[_File]:
        """A file in each folder. Raises OSError where memory is short, and leaves none behind then."""
        name = f"g{self.owner.generation}-r{self.owner.rank}-{len(self.files)}{SUFFIX}"
        paths = [folder / name for folder in self.folders]
        try:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            return [_File.create(path, self.owner, layout, size) for path in paths]
        except OSError:
            for path in paths:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
            raise


class _File:
    """Two copies of a state, of which one at a time is being written."""

    def __init__(self, path: Path, layout: Layout, size: int, *, writable: bool):
        self.path, self.layout, self.size = path, layout, size
        with open(path, "r+b" if writable else "rb") as opened:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
            self.memory = mmap.mmap(opened.fileno(), 0, access=access)
        self.views: dict[int, list[Tensor]] = {}

    @classmethod
    def create(cls, path: Path, owner: Owner, layout: Layout, size: int) -> _File:
        """An empty file, its memory taken. Raises OSError where there is not enough."""
        with open(path, "wb") as opened:
            opened.truncate(2 * (HEADER + size))
            if hasattr(os, "posix_fallocate"):  # else a lack of memory would end the process when it writes
                os.posix_fallocate(opened.fileno(), 0, 2 * (HEADER + size))
        description = {"owner": vars(owner), "layout": layout, "size": size}
        atomic_write(path.with_suffix(".json"), json.dumps(description))
        return cls(path, layout, size, writable=True)

    def write(self, slot: int, header: Mapping[str, Any], tensors: list[Tensor]) -> None:
        """Overwrite a copy."""
        at = slot * (HEADER + self.size)
        text = json.dumps(header).encode()
        if len(text) > HEADER - 8:
            raise ValueError(f"a header of {len(text)} bytes does not fit into {HEADER}")
        self.memory[at : at + 4] = bytes(4)  # not whole from here on
        for view, tensor in zip(self.tensors(slot), tensors, strict=True):
            view.copy_(tensor)
        self.memory[at + 4 : at + 8] = zlib.crc32(text).to_bytes(4, "little")
        self.memory[at + 8 : at + 8 + len(text)] = text
        self.memory[at : at + 4] = len(text).to_bytes(4, "little")

    def header(self, slot: int) -> dict[str, Any] | None:
        """Of a copy; None: it is not whole."""
        at = slot * (HEADER + self.size)
        length = int.from_bytes(self.memory[at : at + 4], "little")
        text = self.memory[at + 8 : at + 8 + length]
        if not length or zlib.crc32(text) != int.from_bytes(self.memory[at + 4 : at + 8], "little"):
            return None
        return json.loads(text)

    def tensors(self, slot: int) -> list[Tensor]:
        """The memory of a copy, in the order of the layout."""
        if slot not in self.views:
            at = slot * (HEADER + self.size) + HEADER
            self.views[slot] = [_view(self.memory, row.dtype, row.shape, at + row.offset) for row in self.layout]
        return self.views[slot]


def _view(memory: mmap.mmap, name: str, shape: tuple[int, ...], offset: int) -> Tensor:
    dtype, numbers = getattr(torch, name), torch.Size(shape).numel()
    if not numbers:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=numbers, offset=offset).view(shape)


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """(collection, name, shape of the whole, where the piece begins, the piece) of all that a worker holds."""
    for collection, tensors in checkpoint.regions().items():
        for name, (whole, parts) in tensors.items():
            for local, begin in parts:
                if local.numel() or 0 in whole:
                    yield collection, name, tuple(whole), tuple(begin), local.detach()


def _layout(pieces: list[tuple[str, str, tuple[int, ...], tuple[int, ...], Tensor]]) -> tuple[Layout, int]:
    """Where each piece lies, and the bytes of all."""
    found: Layout = []
    at = 0
    for collection, name, whole, begin, local in pieces:
        dtype = str(local.dtype).removeprefix("torch.")
        found.append(Row(collection, name, dtype, whole, begin, tuple(local.shape), at))
        at += -(-local.numel() * local.element_size() // ALIGNED) * ALIGNED
    return found, at


@dataclass(frozen=True)
class Copy:
    """A whole copy in a file."""

    file: _File
    slot: int
    owner: Owner
    header: dict[str, Any]


def _copies(base: Path) -> Iterator[Copy]:
    """All whole copies in the folders of all nodes."""
    for description in sorted(base.glob("*/*.json")):
        with suppress(OSError, ValueError):  # removed, or being made
            known = json.loads(description.read_text())
            layout = [
                Row(c, n, d, tuple(whole), tuple(begin), tuple(shape), at)
                for c, n, d, whole, begin, shape, at in known["layout"]
            ]
            file = _File(description.with_suffix(SUFFIX), layout, known["size"], writable=False)
            for slot in (0, 1):
                header = file.header(slot)
                if header is not None:
                    yield Copy(file, slot, Owner(**known["owner"]), header)


class FlashReader(CheckpointReader):
    """The state after a step, put together from the copies of a generation's workers."""

    def __init__(self, copies: list[Copy]):
        header = copies[0].header
        self.owner, self.step = copies[0].owner, header["step"]
        self._state = header["state"]
        self._views: dict[tuple[str, str], Tensor] = {}
        super().__init__(copies[0].file.path.parent, Manifest(kind="flash", figures=header["figures"]), {})
        known: set[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = set()
        for copy in copies:
            for row, view in zip(copy.file.layout, copy.file.tensors(copy.slot), strict=True):
                self._add(row, view, str(copy.file.path), known)

    def _add(self, row: Row, view: Tensor, file: str, known: set) -> None:
        piece = (row.collection, row.name, row.begin, row.shape)
        if piece in known:  # another worker's, or a second copy
            return
        known.add(piece)
        key = f"{row.collection}/{row.name}@{row.offset}"
        self._views[file, key] = view
        entries = self.index.setdefault(row.collection, {})
        entry = entries.get(row.name, Entry(row.dtype, row.whole, ()))
        entries[row.name] = Entry(row.dtype, row.whole, (*entry.pieces, Piece(file, key, row.begin, row.shape)))

    @property
    def state(self) -> dict[str, Any]:
        """Counters and settings."""
        return self._state

    def complete(self) -> bool:
        """Whether nothing is missing: every number of every tensor, and every worker's random state."""
        if not all(entry.covered() for entries in self.index.values() for entry in entries.values()):
            return False
        names = {f"cpu@{rank}" if rank else "cpu" for rank in range(self.owner.size)}
        return names <= self.index.get("random", {}).keys()

    def _piece(self, name: str, piece: Piece) -> Tensor:
        return self._views[piece.file, piece.key]


def newest_flash(base: Path) -> FlashReader | None:
    """The newest step of which the copies below `base` hold all."""
    found: dict[tuple[int, int], list[Copy]] = {}
    for copy in _copies(base):
        found.setdefault((copy.header["step"], copy.owner.generation), []).append(copy)
    for key in sorted(found, reverse=True):
        reader = FlashReader(found[key])
        if reader.complete():
            return reader
    return None


def flash_at(base: Path, step: int, generation: int) -> FlashReader:
    """The copies of a step that `newest_flash` has found in another process."""
    copies = [copy for copy in _copies(base) if (copy.header["step"], copy.owner.generation) == (step, generation)]
    return FlashReader(copies)


def _remove_older(folder: Path, generation: int) -> None:
    for file in folder.glob("g*-r*"):
        if int(file.name[1:].partition("-")[0]) < generation:
            file.unlink(missing_ok=True)

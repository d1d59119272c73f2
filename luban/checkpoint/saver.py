"""Saving: every process copies what it has and goes on training, while a thread of its own writes the copy.

A checkpoint takes its name, and a run points to it, once every process has read back what it wrote and found it right.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.index import INDEX, Entry, Held, Index, Piece, assign, dumps, merged
from luban.checkpoint.reader import KIND, WHOLE, CheckpointReader
from luban.checkpoint.storage import write_safetensors
from luban.checkpoint.weights import tensor_sha256, weights_hash
from luban.core.artifact import ArtifactWriter, Manifest, Parent, atomic_write, write_json
from luban.core.errors import ArtifactError, DataError, LubanError
from luban.core.hashing import data_sha256, file_sha256
from luban.nn.init import Region

T = TypeVar("T")
SHARD = "{}-{:05d}-of-{:05d}.safetensors"
Regions = Mapping[str, Mapping[str, Region]]
Host = dict[Held, tuple[tuple[int, ...], Tensor]]  # a piece → shape of the whole tensor, and a copy on the host


@dataclass
class SavingTime:
    """Seconds spent on checkpoints."""

    total: float = 0.0  # from the call of each to its end
    blocked: float = 0.0  # of those, in which training waited
    saves: int = 0


@dataclass
class CheckpointSaver:
    """Writes the checkpoints of a run, one after the other.

    Args:
        group: of all processes of the run, on the CPU, used by nobody else; None: one process.
    """

    group: dist.ProcessGroup | None = None
    time: SavingTime = field(default_factory=SavingTime)
    _pending: Future[Manifest | None] | None = None
    _kept: dict[Held, Tensor] = field(default_factory=dict)  # memory of copies, taken once: page-locked for CUDA
    _known: list[Any] = field(default_factory=list)  # digests of what all processes hold
    _mine: set[Held] = field(default_factory=set)  # what this process writes

    def __post_init__(self):
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.size = 1 if self.group is None else self.group.size()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(
        self,
        path: Path,
        checkpoint: Checkpoint,
        *,
        config: dict[str, Any] | None = None,
        parents: tuple[Parent, ...] = (),
        seed: int | None = None,
        copy: bool = True,
    ) -> Future[Manifest | None]:
        """Begin to write a whole checkpoint at `path`, or nothing; every process must call it with its parts.

        Args:
            checkpoint: read before this returns, so that it may change afterwards.
            config, parents, seed: of the artifact, which the first process writes.
            copy: False: wait until all is written instead of copying it.

        Returns:
            The manifest in the first process, None in the others. Its figures are the checkpoint's and `weights_hash`, which
            identifies the weights. Instead of them it may have an ArtifactError (`path` is occupied), a DataError or an
            OSError (the disk refused).
        """
        began = time.monotonic()
        self._settle()
        regions = checkpoint.regions()
        self._share_out(regions)
        host = self._copies(regions, copy=copy)
        art = ArtifactWriter(path, kind=KIND, config=config, parents=parents, seed=seed) if self.rank == 0 else None
        pending = self._thread.submit(self._write, path, checkpoint, host, art)
        pending.add_done_callback(lambda _: self._count(began))
        self._pending = pending
        if not copy:
            self._settle()
        self.time.blocked += time.monotonic() - began
        return pending

    @property
    def holds_copy(self) -> bool:
        """Whether there is memory for copies already, from an earlier save."""
        return bool(self._kept)

    def close(self) -> None:
        """Wait for what is being written."""
        self._thread.shutdown(wait=True)

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.exception()  # whoever has the future reads what went wrong

    def _count(self, began: float) -> None:
        self.time.total += time.monotonic() - began
        self.time.saves += 1

    def _share_out(self, regions: Regions) -> None:
        """Agree on who writes which piece; where all hold what they held before, as before."""
        held = {piece: tensor.numel() * tensor.element_size() for piece, (_, tensor) in _pieces(regions).items()}
        if self.group is None:
            self._mine = set(held)
            return
        digest = data_sha256(sorted([p.collection, p.name, p.begin, p.shape] for p in held))
        digests: list[Any] = [None] * self.size
        dist.all_gather_object(digests, digest, group=self.group)
        if digests != self._known:
            everywhere: list[Any] = [None] * self.size
            dist.all_gather_object(everywhere, held, group=self.group)
            self._mine, self._known = assign(everywhere)[self.rank], digests

    def _copies(self, regions: Regions, *, copy: bool) -> Host:
        """What this process writes, on the host."""
        found = {piece: value for piece, value in _pieces(regions).items() if piece in self._mine}
        if not copy:
            return found
        host: Host = {}
        for piece, (shape, tensor) in found.items():
            like = self._kept.get(piece)
            if like is None or like.dtype != tensor.dtype:
                like = self._kept[piece] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[piece] = shape, like.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for _, tensor in found.values()):
            torch.cuda.synchronize()
        return host

    def _write(self, path: Path, checkpoint: Checkpoint, host: Host, art: ArtifactWriter | None) -> Manifest | None:
        """In the thread: the files of this process, and in the first one what makes a checkpoint of all."""
        if art is None:
            folder = self._from_main(None)
            self._gather(self._attempt(lambda: self._write_files(folder, host)))
            self._from_main(None)
            return None
        try:
            with art:
                self._from_main(art.path)
                parts = self._gather(self._attempt(lambda: self._write_files(art.path, host)))
                self._complete(art, checkpoint, parts)
        except Exception as error:
            self._from_main(error if isinstance(error, LubanError) else DataError(f"cannot write {path}: {error}"))
            raise
        self._from_main(path)
        return art.manifest

    def _complete(self, art: ArtifactWriter, checkpoint: Checkpoint, parts: list[tuple[Index, dict[str, str]]]) -> None:
        """Write the index of all pieces, and read the weights back as they will be loaded."""
        index = merged([part for part, _ in parts])
        for _, hashes in parts:
            art.hashes |= hashes
        atomic_write(art.path / INDEX, dumps(index))
        write_json(art.path / "spec.json", checkpoint.spec)
        write_json(art.path / "state.json", checkpoint.state)
        reader = CheckpointReader(art.path, art.manifest, index)
        art.figures.update(checkpoint.figures, weights_hash=weights_hash(reader.tensors("model")))

    def _write_files(self, folder: Path, host: Host) -> tuple[Index, dict[str, str]]:
        """One file a collection, read back and compared. Returns their index and their hashes."""
        index: Index = {}
        hashes = {}
        for collection in sorted({piece.collection for piece in host}):
            file = WHOLE.format(collection)
            if self.size > 1:
                file = SHARD.format(collection, self.rank + 1, self.size)
            keyed = {
                _key(p, s): (p, s, t.cpu().contiguous()) for p, (s, t) in host.items() if p.collection == collection
            }
            entries = index.setdefault(collection, {})
            for key, (held, shape, tensor) in keyed.items():
                piece = Piece(file, key, held.begin, held.shape, tensor_sha256(tensor))
                known = entries.get(held.name, Entry(str(tensor.dtype).removeprefix("torch."), shape, ()))
                entries[held.name] = Entry(known.dtype, shape, (*known.pieces, piece))
            write_safetensors({key: tensor for key, (_, _, tensor) in keyed.items()}, folder / file)
            with open(folder / file, "rb") as handle:
                os.fsync(handle.fileno())
            hashes[file] = file_sha256(folder / file)
        written = {
            c: e for c, e in index.items() if self.rank or c != "model"
        }  # the first reads the whole model back later
        CheckpointReader(folder, Manifest(kind=KIND), written).verify()
        return index, hashes

    def _attempt(self, work: Callable[[], T]) -> T | str:
        """What `work` returns, or what went wrong, for the first process to raise."""
        try:
            return work()
        except Exception as error:
            return str(error) if self.size == 1 else f"process {self.rank}: {error}"

    def _gather(self, part: T | str) -> list[T]:
        """The parts of all processes, in the first one. Raises DataError there where one failed."""
        parts: list[Any] = [part]
        if self.group is not None:
            parts = [None] * self.size
            dist.gather_object(part, parts if self.rank == 0 else None, group=self.group, group_dst=0)
        if self.rank == 0:
            for failed in parts:
                if isinstance(failed, str):
                    raise DataError(failed)
        return parts

    def _from_main(self, value: Path | Exception | None) -> Any:
        """The first process's value, in all. Raises it in the others where it is an error."""
        if self.group is None:
            return value
        found: list[Any] = [value if not isinstance(value, Exception) else str(value)]
        dist.broadcast_object_list(found, group=self.group, group_src=0)
        if self.rank and isinstance(found[0], str):
            raise ArtifactError(found[0])
        return found[0]


def save_checkpoint(path: Path, checkpoint: Checkpoint, **identity: Any) -> Manifest:
    """Write a whole checkpoint from one process and wait for it, as `CheckpointSaver.save`. Returns its manifest."""
    saver = CheckpointSaver()
    try:
        manifest = saver.save(path, checkpoint, copy=False, **identity).result()
    finally:
        saver.close()
    assert manifest is not None
    return manifest


def _pieces(regions: Regions) -> dict[Held, tuple[tuple[int, ...], Tensor]]:
    """Every part of this process with the shape of the whole; empty ones only of tensors that are empty."""
    found = {}
    for collection, tensors in regions.items():
        for name, (whole, parts) in tensors.items():
            for local, begin in parts:
                if local.numel() or 0 in whole:
                    piece = Held(collection, name, tuple(begin), tuple(local.shape))
                    found[piece] = tuple(whole), local.detach()
    return found


def _key(piece: Held, whole: tuple[int, ...]) -> str:
    """The name of a piece in its file: the tensor's, and which part of it unless it is whole."""
    if piece.shape == whole:
        return piece.name
    return f"{piece.name}[{','.join(f'{at}:{at + size}' for at, size in zip(piece.begin, piece.shape, strict=True))}]"

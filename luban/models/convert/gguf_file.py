"""GGUF files: the header, and tensors on demand (llama.cpp's specification, versions 2 and 3, little-endian)."""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.convert.gguf_quants import KNOWN, QUANTS, Quant

MAGIC = b"GGUF"
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_AXES = 4
PARTS = "split.count"
PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and how."""

    name: str
    shape: tuple[int, ...]  # as torch has it: the last axis lies together
    quant: Quant
    start: int  # first byte in its file
    data: mmap.mmap  # the file, which stays mapped

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.elements // self.quant.block * self.quant.bytes


@dataclass
class GGUFFile:
    """An opened file: `metadata` by key, `stored` tensors by name, of all parts where it was split."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32."""
        found = self.stored[name]
        raw = torch.frombuffer(bytearray(found.data[found.start : found.start + found.bytes]), dtype=torch.uint8)
        return found.quant.numbers(raw.view(-1, found.quant.bytes)).reshape(found.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All of them in float32."""
        return {name: self.tensor(name) for name in self.stored}


def is_gguf(path: Path) -> bool:
    """True if a file has the extension .gguf or GGUF's first bytes (Ollama's blobs have no extension)."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of a file, and those of the other parts where it is one of several (NAME-00001-of-00003.gguf).

    Raises:
        ArtifactError: no GGUF file, one cut short (the first tensor that isn't whole is named), or a missing part.
        UnsupportedError: a version, byte order or quantisation that isn't read (the tensor is named).
    """
    opened = _open(path)
    count = opened.metadata.get(PARTS, 1)
    if not isinstance(count, int) or count < 2:
        return opened
    named = PART.fullmatch(path.name)
    if not named or int(named["count"]) != count:
        raise ArtifactError(
            f"{path} is one of {count} parts, which must be called NAME-00001-of-{count:05}.gguf and so on"
        )
    files = [path.with_name(f"{named['name']}-{i + 1:05}-of-{count:05}{named['end']}") for i in range(count)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ArtifactError(f"{path} is one of {count} parts, and {missing} is missing")
    first, *others = [_open(file) for file in files]
    for file, part in zip(files[1:], others, strict=True):
        if twice := sorted(first.stored.keys() & part.stored.keys()):
            raise ArtifactError(f"{file} holds the tensor {twice[0]}, which an earlier part holds too")
        first.stored |= part.stored
    return first


def _open(path: Path) -> GGUFFile:
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ArtifactError(f"{path} is not a GGUF file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = Reader(data)
    try:
        return _read(path, reader)
    except (struct.error, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is truncated or damaged within its header ({error})") from None


def _read(path: Path, reader: Reader) -> GGUFFile:
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise UnsupportedError(f"{path} is GGUF version {version} or big-endian; little-endian 2 and 3 are read")
    count, keys = reader.scalar("<Q"), reader.scalar("<Q")
    opened = GGUFFile(path)
    for _ in range(keys):
        key = reader.string()
        opened.metadata[key] = reader.value(reader.scalar("<I"))
    places = []
    for _ in range(count):
        name, axes = reader.string(), reader.scalar("<I")
        if axes > MAX_AXES:
            raise ArtifactError(f"{path}: the tensor {name} has {axes} axes; at most {MAX_AXES} are possible")
        shape = tuple(reader.scalar("<Q") for _ in range(axes))[::-1]
        kind, offset = reader.scalar("<I"), reader.scalar("<Q")
        if kind not in QUANTS:
            raise UnsupportedError(
                f"{path}: the tensor {name} is stored as {KNOWN.get(kind, f'type {kind}')}, which "
                f"isn't read; known: {', '.join(q.name for q in QUANTS.values())}"
            )
        places.append((name, shape, QUANTS[kind], offset))
    alignment = opened.metadata.get("general.alignment", 32)
    begin = -(-reader.at // alignment) * alignment
    for name, shape, quant, offset in places:
        stored = Stored(name, shape, quant, begin + offset, reader.data)
        if not stored.elements:
            raise ArtifactError(f"{path}: the tensor {name} of shape {shape} holds nothing")
        if shape and shape[-1] % quant.block:
            raise ArtifactError(
                f"{path}: the tensor {name} of shape {shape} can't be stored as {quant.name}, "
                f"whose blocks hold {quant.block}"
            )
        if stored.start + stored.bytes > len(reader.data):
            raise ArtifactError(
                f"{path} is truncated: the tensor {name} should end at byte "
                f"{stored.start + stored.bytes}, the file has {len(reader.data)}"
            )
        opened.stored[name] = stored
    return opened


class Reader:
    """Values one behind the other. Raises struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, len(MAGIC)

    def scalar(self, kind: str) -> Any:
        """One number."""
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def string(self) -> str:
        """A length and so many bytes of UTF-8."""
        length = self.scalar("<Q")
        if self.at + length > len(self.data):
            raise struct.error(f"a text of {length} bytes at byte {self.at} passes the end")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of a metadata type."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, length = self.scalar("<I"), self.scalar("<Q")
            if length > len(self.data):
                raise struct.error(f"a list of {length} values at byte {self.at} passes the end")
            return [self.value(inner) for _ in range(length)]
        if kind not in SCALARS:
            raise struct.error(f"unknown metadata type {kind} at byte {self.at}")
        return self.scalar(SCALARS[kind])

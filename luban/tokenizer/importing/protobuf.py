"""Just enough of protocol buffers' wire format to read a message that is already there.

Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: int for varints, bytes for everything with a length, float for 32 bits.

    Raises:
        ValueError: this is no message.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, position = _varint(data, position)
        if size is None or not number or position + size > len(data):
            raise ValueError(f"no protocol buffer: wire type {wire} at byte {position}")
        chunk = data[position : position + size]
        position += size
        yield number, struct.unpack("<f", chunk)[0] if wire == 5 else chunk


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("no protocol buffer: it ends inside a number")

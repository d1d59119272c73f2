"""SentencePiece's precompiled normalisation: rules "these characters → those", applied from left to right, longest first.

The `tokenizers` library's own reading of such rules (its normalizer `Precompiled`) replaces a whole grapheme by the rule
of its first characters, so that vowel signs and accents behind a replaced character are lost. This one does what
SentencePiece does (normalizer.cc, `NormalizePrefix`).

Format: 4 bytes with the size of a double-array trie (darts-clone), the trie, then the replacements, each ended by a zero.
A unit of the trie holds a label (bits 0 to 7, and 31), whether a rule ends there (bit 8), and where its children stand
(bits 10 to 30, times 256 where bit 9 is set); the unit behind the end of a rule holds the place of its replacement.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

import numpy as np

from luban.core.errors import DataError

LABEL, LEAF = 0x800000FF, 1 << 8
LONGEST = 32  # characters of a rule's left side
BASIC = 0x10000  # code points that a character class finds quickly; those above are all looked up


class Charsmap:
    """The rules of one precompiled normalisation.

    Args:
        data: the `precompiled_charsmap` of a model, decoded from base64 where it was.

    Raises:
        DataError: the data is damaged.
    """

    def __init__(self, data: bytes):
        size = int.from_bytes(data[:4], "little")
        if len(data) <= 4 or size % 4 or size == 0 or 4 + size > len(data):
            raise DataError("the vocabulary's precompiled normalisation is damaged")
        self._table = np.frombuffer(data[4 : 4 + size], dtype="<u4").astype(np.uint32)
        self._units = memoryview(self._table.tobytes()).cast("I")  # read one at a time, faster than from an array
        self._replacements = data[4 + size :]
        self._root = int(_children(self._table[:1])[0])
        found = {code: self._longest(chr(code), 0)[1] for code in range(1, 128)}
        codes, nodes, _ = self._characters(np.array([self._root], dtype=np.int64))
        several = (self._characters(nodes[codes < 128])[0] < 128).any()  # whether a rule is of several ASCII characters
        self._ascii = (
            None if several else {c: replacement for c, replacement in found.items() if replacement is not None}
        )

    def __call__(self, text: str) -> str:
        """`text` by the rules."""
        if self._ascii is not None and text.isascii():
            return text.translate(self._ascii)
        out, position = [], 0
        for start, stop, replacement in self._found(text):
            out += [text[position:start], replacement]
            position = stop
        return "".join([*out, text[position:]])

    def aligned(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """`text` by the rules, and for each character of the result the range of `text` that it comes from."""
        out, ranges, position = [], [], 0
        for start, stop, replacement in [*self._found(text), (len(text), len(text), "")]:
            out += [text[position:start], replacement]
            ranges += [(i, i + 1) for i in range(position, start)] + [(start, stop)] * len(replacement)
            position = stop
        return "".join(out), ranges

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """(start, stop, replacement) of the rules that apply to `text`, in order."""
        found, position = [], 0
        for match in self._pattern.finditer(text):
            start = match.start()
            if start >= position:
                stop, replacement = self._longest(text, start)
                if replacement is not None:
                    found.append((start, stop, replacement))
                    position = stop
        return found

    def _longest(self, text: str, start: int) -> tuple[int, str | None]:
        """Where the longest rule that begins at `start` ends, and its replacement, or None where no rule begins."""
        units, node, place = self._units, self._root, -1
        data = text[start : start + LONGEST].encode("utf-8", "replace")
        size = 0
        for number, byte in enumerate(data, 1):
            node ^= byte
            unit = units[node] if node < len(units) else 0
            if unit & LABEL != byte:
                break
            node ^= (unit >> 10) << ((unit & (1 << 9)) >> 6)
            if unit & LEAF:
                size, place = number, units[node] & 0x7FFFFFFF
        if place < 0:
            return start, None
        end = self._replacements.find(b"\x00", place)
        replacement = self._replacements[place : end if end >= 0 else None].decode("utf-8", "replace")
        return start + len(data[:size].decode("utf-8", "replace")), replacement

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A pattern of the places where a rule may begin."""
        codes, nodes, ends = self._characters(np.array([self._root], dtype=np.int64))
        alone, seconds = set(codes[ends].tolist()), set(self._characters(nodes)[0].tolist())
        return re.compile(f"[{_ranges(alone)}]|[{_ranges(set(codes.tolist()) - alone)}](?=[{_ranges(seconds)}])")

    def _characters(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All characters that lead on from some nodes: (code points, nodes behind them, whether a rule ends there)."""
        bytes_ = np.arange(1, 256, dtype=np.int64)
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))]
        codes, left = np.zeros(len(nodes), dtype=np.int64), np.full(len(nodes), -1)  # bytes left of a character begun
        while len(nodes):
            children = nodes[:, None] ^ bytes_
            units = self._table[np.where(children < len(self._table), children, 0)]
            parents, labels = np.nonzero((children < len(self._table)) & ((units & LABEL) == bytes_))
            units, byte = units[parents, labels], bytes_[labels]
            nodes = children[parents, labels] ^ _children(units)
            begun = left[parents] >= 0
            more = (byte >= 0xC0).astype(np.int64) + (byte >= 0xE0) + (byte >= 0xF0)  # bytes that follow a leading one
            codes = np.where(begun, codes[parents] << 6 | (byte & 0x3F), np.where(more, byte & (0x3F >> more), byte))
            left = np.where(begun, left[parents] - 1, more)
            done = left == 0
            found.append((codes[done], nodes[done], (units[done] & LEAF) > 0))
            nodes, codes, left = nodes[~done], codes[~done], left[~done]
        return tuple(np.concatenate(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


@lru_cache(maxsize=4)
def charsmap(data: bytes) -> Charsmap:
    """The rules in `data`; the same object for the same data. Raises DataError where it is damaged."""
    return Charsmap(data)


def _children(units: np.ndarray) -> np.ndarray:
    """(n,) int64: where the children of the (n,) uint32 units stand, to be combined by exclusive or."""
    wide = units.astype(np.int64)
    return (wide >> 10) << ((wide & (1 << 9)) >> 6)


def _ranges(codes: set[int]) -> str:
    """A character class of code points; of those above BASIC all or none, since `re` would search a list of them."""
    found, above = [], any(code >= BASIC for code in codes)
    for code in sorted(code for code in codes if code < BASIC):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    inside = "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in found)
    return (inside + ("\\U00010000-\\U0010ffff" if above else "")) or "\\ud800"

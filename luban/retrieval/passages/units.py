"""Whole units, such as sentences, joined to passages up to a length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def pack(sizes: Sequence[int], length: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of units whose sizes add up to `length` at most; a larger unit is a run by itself.

    Each run begins with the last units of the one before it, as many as fit into `overlap`.
    """
    first, last = 0, 0
    while last < len(sizes):
        total = sum(sizes[first:last])
        while first < last and total + sizes[last] > length:  # the repeated units would leave no space for a new one
            total -= sizes[first]
            first += 1
        while last < len(sizes) and (last == first or total + sizes[last] <= length):
            total += sizes[last]
            last += 1
        yield first, last
        repeated, start = 0, last
        while overlap and start - 1 > first and repeated + sizes[start - 1] <= overlap:
            start -= 1
            repeated += sizes[start]
        first = start

"""The event heap: four children a node, ordered by (time, random number, sequence number).

The random number is drawn by the seeded generator when the event is made. Without it, events of one instant would be handled in
the order in which they were made, and senders in lockstep would find one of them always first.
"""

from __future__ import annotations

import numpy as np

from luban.netsim.compiled import compiled
from luban.netsim.engine.access import event_at

MULTIPLIER = np.uint64(0x2545F4914F6CDD1D)
SHIFTS = (np.uint64(12), np.uint64(25), np.uint64(27))
TOP_22 = np.uint64(42)
TOP_53 = np.uint64(11)
UNIT = 2.0**-53


@compiled
def random_bits(s):
    """64 random bits (xorshift64*, Vigna 2016)."""
    x = s.rng
    x ^= x >> SHIFTS[0]
    x ^= x << SHIFTS[1]
    x ^= x >> SHIFTS[2]
    s.rng = x
    return x * MULTIPLIER


@compiled
def random_unit(s):
    """A random float in [0, 1)."""
    return np.int64(random_bits(s) >> TOP_53) * UNIT


@compiled
def random_below(s, n):
    """A random integer from 0 to n - 1."""
    return np.int64(random_unit(s) * n)


@compiled
def _set(event, time, tie, what):
    event.time, event.tie, event.what = time, tie, what


@compiled
def push(s, time, kind, argument):
    """Let `kind` happen to `argument` at `time` (ps)."""
    s.sequence += 1
    tie = (np.int64(random_bits(s) >> TOP_22) << 40) | (s.sequence & 0xFFFFFFFFFF)
    i = np.int64(s.heap_size)
    s.heap_size += 1
    while i > 0:
        parent = (i - 1) >> 2
        if event_at(s, parent).time < time or (event_at(s, parent).time == time and event_at(s, parent).tie < tie):
            break
        _set(event_at(s, i), event_at(s, parent).time, event_at(s, parent).tie, event_at(s, parent).what)
        i = parent
    _set(event_at(s, i), time, tie, np.int64(argument) * 16 + kind)


@compiled
def pop(s):
    """Take the first event out of the heap; returns its time (ps) and `argument · 16 + kind`."""
    time, what = event_at(s, 0).time, event_at(s, 0).what
    s.heap_size -= 1
    n = np.int64(s.heap_size)
    last_time, last_tie, last_what = event_at(s, n).time, event_at(s, n).tie, event_at(s, n).what
    i = np.int64(0)
    while True:
        child = 4 * i + 1
        if child >= n:
            break
        best = child
        for other in range(child + 1, min(child + 4, n)):
            if event_at(s, other).time < event_at(s, best).time or (
                event_at(s, other).time == event_at(s, best).time and event_at(s, other).tie < event_at(s, best).tie
            ):
                best = other
        if event_at(s, best).time > last_time or (
            event_at(s, best).time == last_time and event_at(s, best).tie > last_tie
        ):
            break
        _set(event_at(s, i), event_at(s, best).time, event_at(s, best).tie, event_at(s, best).what)
        i = best
    _set(event_at(s, i), last_time, last_tie, last_what)
    return time, what

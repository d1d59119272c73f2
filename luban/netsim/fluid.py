"""Fluid mode: the max-min fair rates of flows over fixed paths, without packets.

Progressive filling: all rates grow together; when a link is full, the flows that cross it keep their rate, and the others grow
on. The same flows finish one after the other in `fluid_times`, rates being solved anew at each end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.core.errors import DataError
from luban.netsim.compiled import cached, compiled
from luban.netsim.topology.network import Network, Path


def max_min_rates(paths: Sequence[Sequence[int]], capacity: np.ndarray) -> np.ndarray:
    """Max-min fair rates.

    Args:
        paths: the links of each flow.
        capacity: of each link, (links,), any unit.

    Returns:
        (flows,) in the unit of `capacity`.
    """
    start, links = _as_csr(paths)
    return solve(start, links, np.asarray(capacity, np.float64))


def _as_csr(paths: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    start = np.concatenate([[0], np.cumsum([len(p) for p in paths])]).astype(np.int64)
    return start, np.fromiter((link for p in paths for link in p), np.int32, int(start[-1]))


def solve(start: np.ndarray, links: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """As `max_min_rates`, with the links of flow i as `links[start[i]:start[i + 1]]`.

    Raises:
        DataError: a link that doesn't exist or has no capacity.
    """
    if len(links) and not (links.min() >= 0 and links.max() < len(capacity)):
        raise DataError(f"a path uses a link outside of 0 to {len(capacity) - 1}")
    if len(links) and capacity[links].min() <= 0:
        raise DataError("a path uses a link without capacity")
    return _progressive_filling(start, links, capacity)


@cached
def _progressive_filling(start, links, capacity):
    flows, count = len(start) - 1, len(capacity)
    # Flows of each link, as slices of one array.
    first = np.zeros(count + 1, np.int64)
    for link in links:
        first[link + 1] += 1
    for link in range(count):
        first[link + 1] += first[link]
    members = np.empty(len(links), np.int32)
    filled = first.copy()
    for flow in range(flows):
        for i in range(start[flow], start[flow + 1]):
            members[filled[links[i]]] = flow
            filled[links[i]] += 1
    rest, unfixed = capacity.copy(), np.zeros(count, np.int64)
    for link in range(count):
        unfixed[link] = first[link + 1] - first[link]
    heap_level, heap_link = np.empty(count), np.empty(count, np.int64)
    size = 0
    for link in range(count):
        if unfixed[link]:
            _sift_up(heap_level, heap_link, size, rest[link] / unfixed[link], link)
            size += 1
    rates = np.full(flows, np.inf)
    while size:
        level, link = heap_level[0], heap_link[0]
        if unfixed[link] == 0:
            size -= 1
            _sift_down(heap_level, heap_link, size, heap_level[size], heap_link[size])
            continue
        now = rest[link] / unfixed[link]
        if now > level:  # flows of the link were fixed at other links: its level has risen
            _sift_down(heap_level, heap_link, size, now, link)
            continue
        for i in range(first[link], first[link + 1]):
            flow = members[i]
            if rates[flow] != np.inf:
                continue
            rates[flow] = level
            for j in range(start[flow], start[flow + 1]):
                other = links[j]
                rest[other] = max(rest[other] - level, 0.0)
                unfixed[other] -= 1
    return rates


@compiled
def _sift_up(level, link, size, new_level, new_link):
    i = size
    while i > 0 and level[(i - 1) >> 1] > new_level:
        level[i], link[i] = level[(i - 1) >> 1], link[(i - 1) >> 1]
        i = (i - 1) >> 1
    level[i], link[i] = new_level, new_link


@compiled
def _sift_down(level, link, size, new_level, new_link):
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and level[child + 1] < level[child]:
            child += 1
        if level[child] >= new_level:
            break
        level[i], link[i] = level[child], link[child]
        i = child
    level[i], link[i] = new_level, new_link


def fluid_times(network: Network, paths: Sequence[Path], sizes: Sequence[float]) -> np.ndarray:
    """Seconds until each of the flows, which start together, has sent its bytes at max-min fair rates.

    Args:
        paths: ports of each flow.
        sizes: bytes of each flow.
    """
    capacity = np.repeat([link.rate * 1.25e5 for link in network.links], 2)  # bytes a second of each port
    left, done = np.array(sizes, np.float64), np.zeros(len(paths))
    active, now = np.arange(len(paths)), 0.0
    while len(active):
        rates = max_min_rates([paths[i] for i in active], capacity)
        step = float(np.min(left[active] / rates))
        now += step
        left[active] -= rates * step
        ended = left[active] <= 1e-9 * np.asarray(sizes)[active]
        done[active[ended]] = now
        active = active[~ended]
    return done

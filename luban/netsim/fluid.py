"""Fluid mode: the max-min fair rates of flows over fixed paths, without packets.

Progressive filling: all rates grow together, each in proportion to its flow's weight; when a link is full, the flows that cross it
keep their rate, and the others grow on. A sprayed flow loads each link of its paths with a share of its rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.core.errors import DataError
from luban.netsim.compiled import cached, compiled

work_type = np.dtype(
    [
        ("first", "i8"),  # where the flows of the link begin in the list of all members
        ("filled", "i8"),  # how many of them are written
        ("unfixed", "i8"),  # flows whose rate may still grow
        ("growth", "f8"),  # load a unit of level: sum of weight times share over these flows
        ("rest", "f8"),  # capacity that is left
        ("level", "f8"),  # of the heap's entry at this place
        ("link", "i8"),  # the same
        ("used", "i8"),  # the link that is the i-th in use
    ]
)


def max_min_rates(
    paths: Sequence[Sequence[int]], capacity: np.ndarray, weights: Sequence[float] | None = None
) -> np.ndarray:
    """Max-min fair rates.

    Args:
        paths: the links of each flow.
        capacity: of each link, (links,), any unit.
        weights: of the flows; by default all alike.

    Returns:
        (flows,) in the unit of `capacity`.
    """
    start, links = as_csr(paths)
    return solve(start, links, np.asarray(capacity, np.float64), weights=weights)


def as_csr(paths: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(flows + 1,) where the links of each flow begin, and the links of all flows one after the other."""
    start = np.concatenate([[0], np.cumsum([len(p) for p in paths])]).astype(np.int64)
    return start, np.fromiter((link for p in paths for link in p), np.int32, int(start[-1]))


def solve(
    start: np.ndarray,
    links: np.ndarray,
    capacity: np.ndarray,
    *,
    shares: np.ndarray | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """As `max_min_rates`, with the links of flow i as `links[start[i]:start[i + 1]]`.

    Args:
        shares: of the flow's rate that each of these links carries; by default all of it.

    Raises:
        DataError: a link that doesn't exist or has no capacity, a weight or share that isn't above 0.
    """
    flows = len(start) - 1
    shares = np.ones(len(links)) if shares is None else np.asarray(shares, np.float64)
    given = np.ones(flows) if weights is None else np.asarray(weights, np.float64)
    require_solvable(links, capacity, shares, given)
    rates, active = np.full(flows, np.inf), np.arange(flows)
    work, members = np.zeros(len(capacity), work_type), np.empty(len(links), np.int64)
    fill(active, flows, start, links, shares, capacity, given, rates, work, members)
    return rates


def require_solvable(links: np.ndarray, capacity: np.ndarray, shares: np.ndarray, weights: np.ndarray) -> None:
    """Raise DataError for what has no max-min fair rates."""
    if len(links) and not (links.min() >= 0 and links.max() < len(capacity)):
        raise DataError(f"a path uses a link outside of 0 to {len(capacity) - 1}")
    if len(links) and capacity[links].min() <= 0:
        raise DataError("a path uses a link without capacity")
    if (len(shares) and not shares.min() > 0) or (len(weights) and not weights.min() > 0):
        raise DataError("weights of flows, and shares of their rates on links, must be above 0")


@cached
def fill(active, count, start, links, shares, capacity, weights, rates, work, members):
    """Write the rates of the first `count` flows of `active`; `work` (a record a link) and `members` are overwritten."""
    used, size = _use(active, count, start, links, shares, capacity, weights, rates, work, members), 0
    for i in range(used):
        link = work[i].used
        _sift_up(work, size, work[link].rest / work[link].growth, link)
        size += 1
    while size:
        level, link = work[0].level, work[0].link
        if work[link].unfixed == 0:
            size -= 1
            _sift_down(work, size, work[size].level, work[size].link)
            continue
        now = work[link].rest / work[link].growth
        if now > level:  # flows of the link were fixed at other links: its level has risen
            _sift_down(work, size, now, link)
            continue
        for i in range(work[link].first, work[link].first + work[link].filled):
            flow = members[i]
            if rates[flow] != np.inf:
                continue
            rates[flow] = level * weights[flow]
            for j in range(start[flow], start[flow + 1]):
                other = links[j]
                work[other].rest = max(work[other].rest - shares[j] * rates[flow], 0.0)
                work[other].growth -= shares[j] * weights[flow]
                work[other].unfixed -= 1


@compiled
def _use(active, count, start, links, shares, capacity, weights, rates, work, members):
    """The links in use, with their flows; returns how many."""
    used = 0
    for i in range(count):
        for j in range(start[active[i]], start[active[i] + 1]):
            work[links[j]].unfixed = 0
    for i in range(count):
        flow = active[i]
        rates[flow] = np.inf
        for j in range(start[flow], start[flow + 1]):
            link = links[j]
            if work[link].unfixed == 0:
                work[used].used = link
                used += 1
                work[link].growth, work[link].filled, work[link].rest = 0.0, 0, capacity[link]
            work[link].unfixed += 1
            work[link].growth += shares[j] * weights[flow]
    position = 0
    for i in range(used):
        link = work[i].used
        work[link].first = position
        position += work[link].unfixed
    for i in range(count):
        flow = active[i]
        for j in range(start[flow], start[flow + 1]):
            link = links[j]
            members[work[link].first + work[link].filled] = flow
            work[link].filled += 1
    return used


@compiled
def _sift_up(work, size, level, link):
    i = size
    while i > 0 and work[(i - 1) >> 1].level > level:
        work[i].level, work[i].link = work[(i - 1) >> 1].level, work[(i - 1) >> 1].link
        i = (i - 1) >> 1
    work[i].level, work[i].link = level, link


@compiled
def _sift_down(work, size, level, link):
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and work[child + 1].level < work[child].level:
            child += 1
        if work[child].level >= level:
            break
        work[i].level, work[i].link = work[child].level, work[child].link
        i = child
    work[i].level, work[i].link = level, link

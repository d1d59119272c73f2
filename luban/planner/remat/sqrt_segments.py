"""√n segments: only each segment's input is kept, and a segment is computed again before its backward pass.

Chen et al. 2016, Training deep nets with sublinear memory cost, section 4.1.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

from luban.core.errors import ConfigError
from luban.planner.remat.chain import Chain, Operation, Schedule, simulate


def sqrt_segments(chain: Chain, segments: int | None = None) -> Schedule:
    """Cut the chain into segments of about equal numbers of stages. The last one is not computed twice.

    Args:
        segments: how many; None: √L, rounded.

    Raises:
        ConfigError: not between 1 and the number of stages.
    """
    stages = len(chain)
    segments = round(sqrt(stages)) if segments is None else segments
    if not 1 <= segments <= stages:
        raise ConfigError(f"{stages} stages are cut into 1 to {stages} segments, not {segments}")
    starts = [stages * k // segments for k in range(segments + 1)]
    operations: list[Operation] = []
    for start, end in pairwise(starts[:-1]):
        operations.append(Operation("forward_keep", start))
        operations += [Operation("forward", i) for i in range(start + 1, end)]
    for index in reversed(range(segments)):
        inside = range(starts[index], starts[index + 1])
        operations += [Operation("forward_save", i) for i in inside]
        if index == segments - 1:
            operations.append(Operation("loss", stages))
        operations += [Operation("backward", i) for i in reversed(inside)]
    return simulate(chain, operations)

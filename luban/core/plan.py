"""How a model is spread over devices and what it recomputes, as data. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from luban.core.resuming import Numerical

Remat = Literal["none", "selective", "full"]
REMATS: tuple[str, ...] = get_args(Remat)  # from the most memory to the least


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """A plan for one device so far."""

    remat: Numerical[Remat] = (
        "none"  # recomputed in the backward pass: nothing, all but matmuls and attention, whole layers
    )

"""Which heads of attention each process of the axis tensor has.

H query heads, K key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.core.plan import even_runs
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.layout import BlockLayout
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import Bias, limited, prepare
from luban.nn.mixer.base import AttentionShape
from luban.nn.position.base import PositionEncoding
from luban.nn.roles import Role
from luban.parallel.collectives import Peers
from luban.parallel.placement import Run


@dataclass(frozen=True)
class HeadRuns:
    """Rows of the projections that each process holds: those of queries (and columns of the output), those of keys."""

    queries: tuple[tuple[Run, ...], ...]
    keys: tuple[tuple[Run, ...], ...]

    def of(self, role: Role) -> tuple[tuple[Run, ...], ...]:
        """The runs of a projection with this role."""
        return self.keys if role in ("k", "v") else self.queries


def head_runs(heads: int, key_heads: int, head_dim: int, ranks: int) -> HeadRuns:
    """Query heads in consecutive runs, as equal as can be, each with the key heads that they read. A key head whose
    queries lie in several processes is in all of these. Raises ConfigError if there are more processes than heads."""
    if heads < ranks:
        raise ConfigError(
            f"plan.tensor {ranks} divides the heads of attention, and there are {heads}: use at most --plan.tensor {heads}"
        )
    queries = list(even_runs(heads, ranks))
    keys = [local_key_heads(begin, end, heads // key_heads) for begin, end in queries]

    def rows(begin: int, end: int) -> Run:
        return begin * head_dim, end * head_dim

    return HeadRuns(
        tuple((rows(begin, end),) for begin, end in queries),
        tuple(tuple(rows(head, head + 1) for head in local) for local in keys),
    )


def local_key_heads(begin: int, end: int, group: int) -> list[int]:
    """The key heads of query heads `begin` … `end` − 1, one for each of the largest equal groups that read one key head.

    Args:
        group: H / K, query heads that read one key head.
    """
    of = [head // group for head in range(begin, end)]
    for size in range(len(of), 0, -1):
        if len(of) % size == 0 and all(len(set(of[at : at + size])) == 1 for at in range(0, len(of), size)):
            return of[::size]
    raise AssertionError("groups of one head always fit")


@dataclass(frozen=True)
class HeadRange:
    """The query heads of one process."""

    peers: Peers

    def of(self, heads: int) -> Run:
        """Begin and end among so many."""
        return list(even_runs(heads, self.peers.size))[self.peers.rank]

    def local(self, shape: AttentionShape) -> AttentionShape:
        """The sizes of what this process has of a layer."""
        begin, end = self.of(shape.heads)
        keys = local_key_heads(begin, end, shape.heads // shape.key_heads)
        return shape._replace(heads=end - begin, key_heads=len(keys))


class DividedHeads(AttentionBackend):
    """Attention of this process's heads: biases and layouts of all heads are cut to them."""

    def __init__(self, heads: HeadRange, kernel: str | None = None):
        super().__init__(kernel)
        self.heads = heads

    def prepare(self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype) -> Any:
        """Mask and bias for the local heads."""
        begin, end = self.heads.of(shape.heads)
        mask, bias = limited(mask, shape), bias if bias is None else bias_of_heads(bias, begin, end)
        if mask.layout is not None and len(mask.layout.table) > 1:
            mask = replace(mask, layout=BlockLayout(mask.layout.table[begin:end], mask.layout.block))
        return prepare(mask, bias, head_dim=shape.head_dim, dtype=dtype, kernel=self.kernel)


def bias_of_heads(bias: Bias, begin: int, end: int) -> Bias:
    """The bias on the scores of query heads `begin` … `end` − 1."""
    whole = bias.encoding
    distance = whole.distance_bias
    if distance is not None:
        distance = replace(distance, parameters=tuple(p[begin:end] for p in distance.parameters))

    def dense() -> Tensor:
        scores = whole.bias()
        assert scores is not None
        return scores[:, begin:end]

    return bias._replace(encoding=PositionEncoding(whole.rotation, distance, dense if whole.biased else None))

"""Low-rank adapters of one input's projections in slots, so that every row of a batch is multiplied by its own adapter's
factors at once: on a GPU by two kernels for all of them (`luban.kernels.grouped_low_rank`), elsewhere one adapter after another.

N rows, I inputs, O outputs of P projections, S slots, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.kernels.available import infers_fused
from luban.kernels.row_groups import RowGroups

SMALLEST_RANK = 16  # that tensor cores take
Linear = Callable[[Tensor, Tensor], Tensor]


class Chosen:
    """Which slot each row of the next forward uses; None: no row uses any.

    Args:
        linear: multiplies where there are no kernels, (N, I) and (O, I) → (N, O).
    """

    def __init__(self, linear: Linear = F.linear):
        self.groups: RowGroups | None = None
        self.linear = linear


class LowRankStack:
    """s·B·A of every slot and projection, filled up with zeros to one rank. It is no module: what it holds is no part of the
    model's weights.

    Args:
        sizes: projection → O, in the order in which a joint matmul concatenates outputs.
        slots: S.
        rank: a slot's largest at first; `put` widens the stack for a larger one.
        like: of the factors' dtype and device.
    """

    def __init__(self, inputs: int, sizes: Mapping[str, int], slots: int, rank: int, like: Tensor, chosen: Chosen):
        self.inputs, self.sizes, self.chosen = inputs, dict(sizes), chosen
        self.names, self.rank = list(sizes), padded_rank(rank)
        self.a_SRI = like.new_zeros(slots, len(sizes) * self.rank, inputs)
        self.b_SOR = like.new_zeros(slots, sum(sizes.values()), self.rank)
        self.scales_SP = like.new_zeros(slots, len(sizes), dtype=torch.float32)
        self._used: set[str] = set()  # projections that have ever had factors; nothing is added to others

    @torch.inference_mode()
    def put(self, slot: int, projection: str, a_RI: Tensor, b_OR: Tensor, scale: float) -> bool:
        """Copy factors into a slot. Returns whether `add` does other work than before: the stack was moved in memory, to hold
        their rank, or they are the projection's first ones."""
        rank, other = len(a_RI), projection not in self._used
        if rank > self.rank:
            self._widen(padded_rank(rank))
            other = True
        at, outputs = self._at(projection, 1)
        self.a_SRI[slot, at.start : at.start + rank].copy_(a_RI)
        self.b_SOR[slot, outputs, :rank].copy_(b_OR)
        self.scales_SP[slot, self.names.index(projection)] = scale
        self._used.add(projection)
        return other

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Make a slot's factors zero."""
        for factors in (self.a_SRI, self.b_SOR, self.scales_SP):
            factors[slot].zero_()

    def add(self, y: Tensor, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Add to outputs y (…, ΣO) what the rows' adapters make of inputs x (…, I), in place; no gradients.

        Args:
            sizes: projections of y, all or one after another.
        """
        groups, names = self.chosen.groups, list(sizes)
        if groups is None or self._used.isdisjoint(sizes):
            return y
        x_NI, y_NO = x.reshape(-1, self.inputs), y.view(-1, y.shape[-1])
        ranks, outputs = self._at(names[0], len(names))
        first = self.names.index(names[0])
        parts = self.a_SRI[:, ranks], self.b_SOR[:, outputs], self.scales_SP[:, first : first + len(names)]
        if not infers_fused(x):
            self._add_segments(y_NO, x_NI, parts, list(sizes.values()), groups)
            return y
        from luban.kernels.grouped_low_rank import add_grouped_low_rank

        add_grouped_low_rank(y_NO, x_NI, *parts, list(sizes.values()), groups)
        return y

    def _add_segments(
        self, y_NO: Tensor, x_NI: Tensor, parts: tuple[Tensor, Tensor, Tensor], sizes: list[int], groups: RowGroups
    ) -> None:
        """The same without kernels."""
        a_SRI, b_SOR, scales_SP = parts
        linear = self.chosen.linear
        for slot, rows in groups.segments:
            rows = rows.to(x_NI.device)
            h_NR = linear(x_NI.index_select(0, rows), a_SRI[slot]).unflatten(-1, (len(sizes), self.rank))
            h_NR, start = (h_NR * scales_SP[slot, :, None]).to(h_NR.dtype), 0
            for index, size in enumerate(sizes):
                added = linear(h_NR[:, index], b_SOR[slot, start : start + size])
                y_NO[:, start : start + size].index_add_(0, rows, added)
                start += size

    def _at(self, projection: str, count: int) -> tuple[slice, slice]:
        """Ranks and outputs of so many projections from this one on."""
        first = self.names.index(projection)
        sizes = list(self.sizes.values())
        start = sum(sizes[:first])
        return (
            slice(first * self.rank, (first + count) * self.rank),
            slice(start, start + sum(sizes[first : first + count])),
        )

    def _widen(self, rank: int) -> None:
        """Give every slot a larger rank; where there is no memory for it the stack stays as it is."""
        a, b, old = self.a_SRI, self.b_SOR, self.rank
        wide_a = a.new_zeros(len(a), len(self.names), rank, self.inputs)
        wide_b = b.new_zeros(*b.shape[:2], rank)
        wide_a[:, :, :old] = a.unflatten(1, (len(self.names), old))
        wide_b[..., :old] = b
        self.a_SRI, self.b_SOR, self.rank = wide_a.flatten(1, 2), wide_b, rank


def padded_rank(rank: int) -> int:
    """The rank that factors are stored with: a power of two."""
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length())

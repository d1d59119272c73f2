"""Sums of gradients over the micro-batches of a step, in memory that is taken once: new pages cost more than the sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Empty = Callable[[Sequence[int], torch.dtype], Tensor]  # (shape, dtype) → new memory


class KeptSums:
    """Sums by the parameters' names, in fp32 (fp64 for fp64).

    Args:
        turns: steps in a row whose sums lie in different memory: with two those of the last step stay as they are meanwhile.
        empty: makes the memory of a sum; None: where the first gradient is.
        borrows: a first gradient that is in fp32 (or fp64) already becomes the sum itself.
    """

    def __init__(self, turns: int = 1, empty: Empty | None = None, *, borrows: bool = False):
        self.sums: dict[str, Tensor] = {}
        self._memory: list[dict[str, Tensor]] = [{} for _ in range(turns)]
        self._empty, self._borrows = empty, borrows

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients to the step's sums."""
        known = [name for name in gradients if name in self.sums]
        first = [name for name in gradients if name not in self.sums]
        if known:
            torch._foreach_add_([self.sums[name] for name in known], [gradients[name] for name in known])
        copied = []
        for name in first:
            gradient = gradients[name]
            wide = torch.promote_types(gradient.dtype, torch.float32)
            if self._borrows and gradient.dtype == wide:
                self.sums[name] = gradient
                continue
            self.sums[name] = self._kept(name, gradient, wide)
            copied.append(name)
        if copied:
            torch._foreach_copy_([self.sums[name] for name in copied], [gradients[name] for name in copied])

    def _kept(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        memory = self._memory[0]
        if name not in memory or memory[name].shape != like.shape:
            make = self._empty
            memory[name] = torch.empty_like(like, dtype=dtype) if make is None else make(like.shape, dtype)
        return memory[name]

    def clear(self) -> None:
        """Forget the step's sums; their memory stays."""
        self.sums = {}
        self._memory.append(self._memory.pop(0))

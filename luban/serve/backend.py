"""How attention over a pool is computed in one process: all heads, or those that tensor parallelism leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luban.generate.paged_cache import PagedCache
from luban.kernels.attention_mask import AttentionMask
from luban.models.base import Model
from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged import PagedAttention
from luban.nn.attention.paged_layer import PagedLayer
from luban.nn.attention.prepared_mask import Bias
from luban.nn.mixer.base import AttentionShape
from luban.parallel.heads import HeadRange, bias_of_heads


class DividedPagedAttention(PagedAttention):
    """Attention of this process's heads to its part of the pool: shapes and biases of all heads are cut to them."""

    def __init__(
        self,
        heads: HeadRange,
        layers: Sequence[PagedLayer | None],
        tokens: PackedTokens,
        kernel: str | None = None,
    ):
        super().__init__(layers, tokens, kernel)
        self.heads = heads

    def prepare(self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype) -> Any:
        """See `PagedAttention.prepare`; shape and bias are those of all heads."""
        bias = None if bias is None else bias_of_heads(bias, *self.heads.of(shape.heads))
        return super().prepare(mask, self.heads.local(shape), bias, dtype)


@dataclass(frozen=True)
class PagedBackend:
    """Makes the attention backend of each forward.

    Args:
        kind: where all heads are here.
        heads: those of this process; None: all.
        kept: in which keys and values are kept (`PagedLayer`); None: in the model's precision.
    """

    kind: type[PagedAttention] = PagedAttention
    heads: HeadRange | None = None
    kept: torch.dtype | None = None

    def over(self, cache: PagedCache, tokens: PackedTokens, kernel: str | None = None) -> PagedAttention:
        """For a forward over these tokens, of a decoder."""
        if self.heads is None:
            return self.kind(cache.layers, tokens, kernel)
        return DividedPagedAttention(self.heads, cache.layers, tokens, kernel)

    def shapes(self, model: Model) -> list[AttentionShape | None]:
        """Of what is attended to here in every layer; None for one that doesn't attend."""
        shapes = [layer.mixer.attention(model.spec.width) for layer in model.spec.layers]
        if self.heads is None:
            return shapes
        return [None if shape is None else self.heads.local(shape) for shape in shapes]

    def cache(self, model: Model, *, blocks: int, block_size: int) -> PagedCache:
        """A pool for the heads that are here."""
        return PagedCache.of(model, blocks=blocks, block_size=block_size, shapes=self.shapes(model), kept=self.kept)

"""Attention over a paged KV cache: chunks of many sequences in one forward, as a single packed row of tokens.

Models see an `AttentionBackend` and a batch of one row; which tokens belong together, where their keys and values are
and what may be seen is known here alone. (Kwon et al. 2023, PagedAttention, section 4.)

N new tokens of all sequences, C sequences, R sequences of one part, T queries of each, S keys, H query heads, K key heads,
G = H / K, D head dim, M blocks of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.core.protocols import KeysValues
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.available import INSTALLED, INTERPRETED
from luban.kernels.distance import DistanceBias
from luban.nn.attention.attend import attention
from luban.nn.attention.backend import AttentionBackend, NewTokens
from luban.nn.attention.packed import PackedSources, PackedTokens
from luban.nn.attention.paged_layer import PagedLayer
from luban.nn.attention.prepared_mask import Bias, PreparedMask
from luban.nn.mixer.base import AttentionShape
from luban.nn.mixer.layout import layout_for

WIDEST = 256  # D that the kernel's tiles hold


@dataclass(frozen=True)
class Part:
    """Sequences with as many queries each, whose attention is one call."""

    rows: slice | Tensor  # which of the N tokens the queries are, R · T of them
    sequences: int  # R
    slots: Tensor | slice | None  # (R, S) of their keys, or where they lie in a row; None: the new tokens' own
    mask: PreparedMask  # dense (R, 1 or H, T, S), or causal


@dataclass(frozen=True)
class KernelMask:
    """What the Triton kernel is told, made once a forward."""

    work: Any  # of `luban.kernels.paged_launch`, as is `bias`
    bias: Any
    window: int | None


def kernel_serves(shape: AttentionShape) -> bool:
    """Whether the Triton kernel can attend in layers of this shape, on a device that runs it."""
    return INSTALLED and shape.layout is None and shape.head_dim <= WIDEST


class PagedAttention(AttentionBackend):
    """Attention of packed tokens to those in the pool; it takes up the new ones first.

    Args:
        layers: of the pool, None for a layer that doesn't attend.
        tokens: of this forward.
        kernel: "luban" (Triton), "torch", or None: the first of them that can serve.
        sources: of the tokens, where the layers cross-attend.
    """

    cached = True
    invariant = False  # true: a token's result doesn't depend on what else is read, bit for bit

    def __init__(
        self,
        layers: Sequence[PagedLayer | None],
        tokens: PackedTokens,
        kernel: str | None = None,
        sources: PackedSources | None = None,
    ):
        super().__init__(kernel)
        self.layers, self.tokens, self.sources = layers, tokens, sources
        self._cross = None if sources is None else type(self)(layers, sources.as_tokens(tokens.block_size), kernel)
        self._cross_masks: dict[AttentionShape, list[Part] | KernelMask] = {}

    def begin(self, tokens: int, token_mask: Tensor | None, positions: Tensor | None) -> NewTokens:
        """The positions; keys are spoken of as if they were the new tokens alone.

        Raises UnsupportedError for a mask or positions: packed tokens are all real and counted.
        """
        if token_mask is not None or positions is not None or tokens != len(self.tokens.positions_N):
            raise UnsupportedError("packed tokens come without padding and positions, in one row")
        positions_1N = self.tokens.positions_N[None]
        return NewTokens(positions_1N, positions_1N, None)

    def layer(self, index: int) -> PagedLayer | None:
        """The layer's part of the pool."""
        return self.layers[index]

    def prepare(
        self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype
    ) -> list[Part] | KernelMask:
        """The parts of this forward for layers of one shape, or what the kernel takes in their place.

        Raises UnsupportedError for a bias that is no function of the distance (`luban.generate.paged_cache.paging_refusal`
        tells before).
        """
        distance_bias = None if bias is None else bias.encoding.distance_bias
        if bias is not None and distance_bias is None:
            raise UnsupportedError("a bias that is no function of the distance needs a contiguous cache")
        return self._prepared(mask.device, shape, distance_bias, dtype)

    def _prepared(
        self, device: torch.device, shape: AttentionShape, distance_bias: DistanceBias | None, dtype: torch.dtype
    ) -> list[Part] | KernelMask:
        """See `prepare`."""
        if not self._by_kernel(device, shape, dtype):
            return self._parts(PartMaker(self.tokens, shape, _reaching(distance_bias, self.tokens), dtype))
        from luban.kernels.paged_launch import PagedBias, padded_width, paged_work

        starts, counts = self.tokens.starts, self.tokens.counts
        work = paged_work(
            starts,
            counts,
            shape.heads,
            shape.key_heads,
            padded_width(shape.head_dim) * dtype.itemsize,
            device,
            single_items=self.tokens.single_items,
            chunk_items=self.tokens.chunk_items,
            invariant=self.invariant,
        )
        return KernelMask(work, PagedBias.of(_reaching(distance_bias, self.tokens)), shape.window)

    def _parts(self, maker: PartMaker) -> Any:
        """What torch's path reads, made once a forward for layers of one shape."""
        return maker.all()

    def _by_kernel(self, device: torch.device, shape: AttentionShape, dtype: torch.dtype) -> bool:
        """Whether the Triton kernel serves layers of this shape."""
        can = kernel_serves(shape) and (device.type == "cuda" or INTERPRETED) and dtype != torch.float64
        return can and (self.kernel == "luban" or (self.kernel is None and device.type == "cuda"))

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """(1, H, N, D) of queries, keys and values of the packed tokens, (1, H or K, N, D)."""
        k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (k_BKTD, v_BKTD))
        new = _store(k_NKD, v_NKD, cache, self.tokens.slots_N, by_kernel=isinstance(mask, KernelMask))
        return self._read(q_BHTD, mask, cache, scale, new)

    def cross_attend(
        self,
        q_BHTD: Tensor,
        project: Callable[[Tensor], KeysValues],
        states_BSE: Tensor | None,
        mask: Any,
        cache: Any,
        scale: float | None,
    ) -> Tensor:
        """(1, H, N, D) of the packed tokens' queries, each to its own source; keys and values of sources that are new go
        into the pool first.

        Args:
            states_BSE: (1, S, E), states of all new sources one after another; None: there are none.
            mask: of no meaning, since the pool holds no padding.
        """
        assert self.sources is not None and self._cross is not None
        shape = AttentionShape(q_BHTD.shape[1], cache.keys.shape[1], cache.keys.shape[2])
        if shape not in self._cross_masks:
            self._cross_masks[shape] = self._cross._prepared(q_BHTD.device, shape, None, q_BHTD.dtype)
        mask = self._cross_masks[shape]
        if states_BSE is not None:
            assert self.sources.new_slots is not None
            k_SKD, v_SKD = (x[0].transpose(0, 1) for x in project(states_BSE))
            _store(k_SKD, v_SKD, cache, self.sources.new_slots, by_kernel=isinstance(mask, KernelMask))
        return self._cross._read(q_BHTD, mask, cache, scale)

    def _read(
        self,
        q_BHTD: Tensor,
        mask: list[Part] | KernelMask,
        cache: PagedLayer,
        scale: float | None,
        new: KeysValues | None = None,
    ) -> Tensor:
        """(1, H, N, D), with everything in the pool.

        Args:
            new: keys and values of the packed tokens, (N, K, D) both, where chunks may read their own ones there.
        """
        if isinstance(mask, KernelMask):
            return self._kernel(q_BHTD[0], mask, cache, scale, new).transpose(0, 1)[None]
        q_NHD = q_BHTD[0].transpose(0, 1)
        if len(mask) == 1:
            return self._part(q_NHD, new, mask[0], cache, scale).transpose(0, 1)[None]
        mixed_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
        for part in mask:
            own = None if new is None else (new[0][part.rows], new[1][part.rows])
            mixed_NHD[part.rows] = self._part(q_NHD[part.rows], own, part, cache, scale)
        return mixed_NHD.transpose(0, 1)[None]

    def _part(
        self, q_NHD: Tensor, new: KeysValues | None, part: Part, cache: PagedLayer, scale: float | None
    ) -> Tensor:
        """(N, H, D) of one part's new tokens; `new`: their keys and values."""
        if part.slots is None:
            assert new is not None
            k_SKD, v_SKD = new
        else:
            k_SKD, v_SKD = cache.read(part.slots if isinstance(part.slots, slice) else part.slots.flatten())
        if part.sequences == 1:
            return _attend(q_NHD[None], k_SKD[None], v_SKD[None], part.mask, scale)[0]
        q_RTHD, k_RSKD, v_RSKD = (x.unflatten(0, (part.sequences, -1)) for x in (q_NHD, k_SKD, v_SKD))
        return _attend(q_RTHD, k_RSKD, v_RSKD, part.mask, scale).flatten(0, 1)

    def _kernel(
        self, q_HND: Tensor, mask: KernelMask, cache: PagedLayer, scale: float | None, new: KeysValues | None
    ) -> Tensor:
        """(N, H, D)."""
        from luban.kernels.paged_launch import paged_attention

        return paged_attention(
            q_HND,
            cache.keys,
            cache.values,
            cache.scales,
            self.tokens.tables_CM,
            mask.work,
            mask.bias,
            block_size=self.tokens.block_size,
            window=mask.window,
            scale=q_HND.shape[-1] ** -0.5 if scale is None else scale,
            new=new if new is not None and new[0].dtype == cache.keys.dtype else None,
        )


def _store(k_NKD: Tensor, v_NKD: Tensor, cache: PagedLayer, slots_N: Tensor, *, by_kernel: bool) -> KeysValues | None:
    """Put keys and values into their slots of the pool. Returns them as they are read later; None: to be read there."""
    if not by_kernel:
        return cache.write(k_NKD, v_NKD, slots_N)
    from luban.kernels.paged_launch import store

    store(k_NKD, v_NKD, cache.keys, cache.values, cache.scales, slots_N)
    return None if cache.scales is not None else (k_NKD, v_NKD)


def _reaching(bias: DistanceBias | None, tokens: PackedTokens) -> DistanceBias | None:
    """A bias that knows all distances of this forward: position methods were told of the new tokens alone. One in buckets
    reaches over the context."""
    if bias is None or bias.buckets is not None:
        return bias
    return replace(bias, keys=max(tokens.lengths))


def _attend(q_RTHD: Tensor, k_RSKD: Tensor, v_RSKD: Tensor, mask: PreparedMask, scale: float | None) -> Tensor:
    """(R, T, H, D). For a query alone the G heads of a group are taken as G queries of one head: keys needn't be
    repeated."""
    (R, T, H, D), K = q_RTHD.shape, k_RSKD.shape[2]
    k_RKSD, v_RKSD = k_RSKD.transpose(1, 2), v_RSKD.transpose(1, 2)
    if T > 1 or K == H:
        return attention(q_RTHD.transpose(1, 2), k_RKSD, v_RKSD, mask, scale).transpose(1, 2)
    if mask.dense is not None and mask.dense.shape[1] == H:
        mask = replace(mask, dense=mask.dense.view(-1, K, H // K, mask.dense.shape[-1]))
    return attention(q_RTHD.view(R, K, H // K, D), k_RKSD, v_RKSD, mask, scale).reshape(R, 1, H, D)


class PartMaker:
    """Makes the parts of one forward for layers of one shape."""

    def __init__(self, tokens: PackedTokens, shape: AttentionShape, bias: DistanceBias | None, dtype: torch.dtype):
        self.tokens, self.shape, self.dtype = tokens, shape, dtype
        self.zero, self.bias_HS = 0, None
        if bias is not None:
            self.zero, self.bias_HS = bias.zero, bias.table()
        firsts, first = [], 0
        for count in tokens.counts:
            firsts.append(first)
            first += count
        self.firsts = firsts  # row of every sequence's first new token

    def all(self) -> list[Part]:
        """One for every chunk of several tokens; single ones together where their numbers of keys are within a factor of 2
        of each other."""
        groups: dict[int, list[int]] = {}
        parts = []
        for index, count in enumerate(self.tokens.counts):
            if count == 1:
                groups.setdefault(self._seen(index).bit_length(), []).append(index)
            else:
                parts.append(self._chunk(index))
        return [*parts, *(self._singles(group) for group in groups.values())]

    def _seen(self, index: int) -> int:
        """Keys that the first new token of a sequence sees."""
        seen = self.tokens.starts[index] + 1
        return seen if self.shape.window is None else min(seen, self.shape.window)

    def _chunk(self, index: int) -> Part:
        start, count = self.tokens.starts[index], self.tokens.counts[index]
        rows = slice(self.firsts[index], self.firsts[index] + count)
        if start == 0 and self.shape.window is None and self.shape.layout is None and self.bias_HS is None:
            return Part(rows, 1, None, PreparedMask(causal=True, backward_only=True))
        queries_RT = self.tokens.positions_N[None, rows]
        first = start + 1 - self._seen(index)
        keys_RS = torch.arange(first, start + count, device=queries_RT.device)[None]
        slots = None if start == 0 else self.slots(self.tokens.tables_CM[index : index + 1], keys_RS)
        return Part(rows, 1, slots, self.mask(queries_RT, keys_RS))

    def _singles(self, group: list[int]) -> Part:
        """Sequences with a new token each; keys past the own one repeat it, unseen."""
        if len(group) == 1 and self.shape.layout is None and self.bias_HS is None:
            return self._single(group[0])
        device, longest = self.tokens.positions_N.device, max(map(self._seen, group))
        rows, index = [self.firsts[each] for each in group], torch.tensor(group, device=device)
        where: slice | Tensor = torch.tensor(rows, device=device)
        if rows == list(range(rows[0], rows[0] + len(rows))):
            where = slice(rows[0], rows[0] + len(rows))
        queries_RT = self.tokens.positions_N[where, None]
        first = torch.tensor([self.tokens.starts[each] + 1 - self._seen(each) for each in group], device=device)
        keys_RS = first[:, None] + torch.arange(longest, device=device)
        mask = self.mask(queries_RT, keys_RS)
        return Part(where, len(group), self.slots(self.tokens.tables_CM[index], keys_RS.clamp(max=queries_RT)), mask)

    def _single(self, index: int) -> Part:
        """One sequence with a new token, which sees all of its keys: where these lie in a row they are read in place."""
        size, start = self.tokens.block_size, self.tokens.starts[index]
        first, row = start + 1 - self._seen(index), self.firsts[index]
        blocks = self.tokens.tables_CM[index, first // size : start // size + 1].tolist()
        slots: slice | Tensor
        if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            begin = blocks[0] * size + first % size
            slots = slice(begin, begin + start + 1 - first)
        else:
            keys_1S = torch.arange(first, start + 1, device=self.tokens.positions_N.device)[None]
            slots = self.slots(self.tokens.tables_CM[index : index + 1], keys_1S)
        return Part(slice(row, row + 1), 1, slots, PreparedMask())

    def slots(self, tables_RM: Tensor, keys_RS: Tensor) -> Tensor:
        """(R, S) of the tokens at these positions."""
        size = self.tokens.block_size
        return tables_RM.gather(1, keys_RS // size).long() * size + keys_RS % size

    def mask(self, queries_RT: Tensor, keys_RS: Tensor) -> PreparedMask:
        """Dense, (R, 1 or H, T, S): what causality, window and layout leave, with the bias."""
        distance_RTS = queries_RT[:, :, None] - keys_RS[:, None]
        seen = distance_RTS >= 0
        if self.shape.window is not None:
            seen = seen & (distance_RTS < self.shape.window)
        seen_RHTS = seen[:, None]
        if (layout := self.shape.layout) is not None:
            blocks = layout_for(layout, max(self.tokens.lengths), self.shape.heads, True, keys_RS.device)
            queries, keys = queries_RT // blocks.block, keys_RS // blocks.block
            kept_HRTS = blocks.table[:, queries[:, :, None], keys[:, None].clamp(max=blocks.table.shape[2] - 1)]
            seen_RHTS = seen_RHTS & kept_HRTS.transpose(0, 1)
        added: Any = 0.0
        if self.bias_HS is not None:
            added = self.bias_HS[:, distance_RTS.clamp(min=0) + self.zero].transpose(0, 1)
        dense = torch.where(seen_RHTS, torch.as_tensor(added, device=keys_RS.device), float("-inf"))
        return PreparedMask(dense=dense.to(self.dtype))

"""Block-sparse attention: base config of layouts, and the layouts of a forward.

A block of queries attends only to some blocks of keys (within the mask), so cost grows with the number of those. Blocks
are counted in real tokens of the row, so a document in a pack is divided into other blocks than the same document alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch._guards import detect_fake_mode

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.kernels import layout as blocks
from luban.kernels.layout import BlockLayout
from luban.kernels.limits import BLOCK_SIDES
from luban.kernels.tracing import constant_in_graphs


@dataclass(frozen=True, kw_only=True)
class Layout(Variant):
    """Base config of layouts (registry `attention layout`). In each of them a token attends to its own block and to those
    within `window` tokens: before it and, if the model isn't causal, after it."""

    registry: ClassVar[Registry] = Registry(
        "attention layout",
        {
            "local": "luban.nn.mixer.layout:Local",
            "strided": "luban.nn.mixer.layout:Strided",
            "global_random": "luban.nn.mixer.layout:GlobalRandom",
            "blockwise": "luban.nn.mixer.layout:Blockwise",
        },
    )
    by_head: ClassVar[bool] = False  # each head has its own layout
    block: int = 64  # tokens a side
    window: int = 128  # tokens

    def __post_init__(self):
        if self.block not in BLOCK_SIDES:
            raise ConfigError(f"a layout's block must be one of {', '.join(map(str, BLOCK_SIDES))}, {self.block} given")
        if self.window < 0:
            raise ConfigError(f"a layout's window can't be negative, {self.window} given")

    def build(self, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
        """For rows of `length` tokens."""
        raise NotImplementedError

    def density(self, length: int, heads: int, causal: bool) -> float:
        """Share of the square of scores that is left, the diagonal's blocks halved in a causal model."""
        table = layout_for(self, length, heads, causal, torch.device("cpu")).table.float()
        kept = table.sum() - (table.diagonal(dim1=1, dim2=2).sum() / 2 if causal else 0)
        return float(kept / table.numel())


@dataclass(frozen=True, kw_only=True)
class Local(Layout):
    """Nothing else: a sliding window in whole blocks."""

    def build(self, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
        """One layout for all heads."""
        return blocks.local(length, self.window, block=self.block, causal=causal, device=device)


@dataclass(frozen=True, kw_only=True)
class Strided(Layout):
    """And every `stride`-th block (Child et al. 2019, section 4.2)."""

    stride: int = 8  # blocks

    def __post_init__(self):
        super().__post_init__()
        if self.stride < 1:
            raise ConfigError(f"a layout's stride must be at least 1, {self.stride} given")

    def build(self, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
        """One layout for all heads."""
        return blocks.strided(length, self.window, self.stride, block=self.block, causal=causal, device=device)


@dataclass(frozen=True, kw_only=True)
class GlobalRandom(Layout):
    """And the first blocks of the row, and some drawn for every row and head (BigBird, Zaheer et al. 2020): earlier ones, in
    encoders also those that drew it, so that padding changes nothing."""

    by_head: ClassVar[bool] = True
    first: int = 1  # blocks that everyone sees
    random: int = 3  # earlier blocks that a block draws
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if min(self.first, self.random, self.seed) < 0:
            raise ConfigError(
                f"first, random and seed of a layout can't be negative: {self.first}, {self.random}, {self.seed} given"
            )

    def build(self, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
        """Layouts head by head."""
        return blocks.global_random(
            length,
            self.window,
            first=self.first,
            random=self.random,
            seed=self.seed,
            heads=heads,
            block=self.block,
            causal=causal,
            device=device,
        )


@dataclass(frozen=True, kw_only=True)
class Blockwise(Layout):
    """And its own span of tokens and the one before it (blockwise causal attention, Sun et al. 2022, section 3.3). With spans
    of half a training row this changes nothing in training, and longer texts are read as rows of that length are."""

    window: int = 0
    span: int = 512  # tokens, a multiple of `block`

    def __post_init__(self):
        super().__post_init__()
        if self.span < 1 or self.span % self.block:
            near = max(round(self.span / self.block), 1) * self.block
            raise ConfigError(
                f"a layout's span must be a multiple of its block of {self.block}, {self.span} given: use {near}"
            )

    def build(self, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
        """One layout for all heads."""
        return blocks.blockwise(length, self.window, self.span, block=self.block, causal=causal, device=device)


def layout_for(layout: Layout, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
    """`layout.build`, kept from forward to forward, unless tensors are made for their shapes alone."""
    whole = -(-length // layout.block) * layout.block  # so that a growing row asks for a new one now and then only
    whole = len(range(whole))  # a constant in a graph traced for any number of tokens: other blocks are another graph
    options = tuple((field.name, getattr(layout, field.name)) for field in fields(layout))
    return _constant(type(layout), options, whole, heads, causal, device)


@constant_in_graphs
def _constant(kind: type[Layout], options: tuple[tuple[str, int], ...], *rest: Any) -> BlockLayout:
    """From plain values, since torch 2.11's compiler takes no dataclass as an argument of what it calls."""
    layout = kind(**dict(options))
    return layout.build(*rest) if detect_fake_mode() is not None else _cached(layout, *rest)


@lru_cache(maxsize=8)
def _cached(layout: Layout, length: int, heads: int, causal: bool, device: torch.device) -> BlockLayout:
    with torch.inference_mode(False):  # training takes what generation had made
        return layout.build(length, heads, causal, device)

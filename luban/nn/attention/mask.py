"""What is done to attention scores before the softmax, made ready once a forward and shared by all layers.

B batch, T queries, S keys, H heads, D head width. Slots are places in the row (padding included), positions count
real tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from luban.core.protocols import KVCache
from luban.kernels.dispatch import choice
from luban.kernels.distance import DistanceBias
from luban.kernels.intervals import Intervals
from luban.kernels.layout import BlockLayout
from luban.kernels.visible import Visible, consecutive
from luban.nn.attention.family import Limits
from luban.nn.attention.layout import layout_for

if TYPE_CHECKING:
    from luban.nn.position.family import PositionMethod


@dataclass(frozen=True)
class Scores:
    """Masks and biases in the form that the chosen kernel takes. The default: everything is seen, nothing added."""

    path: str = "torch"  # of `kernels.dispatch`
    causal: bool = False  # the bare triangle, which kernels draw themselves
    mask: Tensor | None = None  # torch: (1 or B, 1 or H, T, S) to add
    backward_only: bool = False  # no query sees a later key, T = S
    seen: Intervals | None = None  # luban: where not the bare triangle
    edges: Tensor | None = None  # flash4: (B·C + 1,), where packed documents begin and end; none: rows as they are
    bias: DistanceBias | None = None  # luban
    layout: BlockLayout | None = None  # luban
    sound: Tensor | None = None  # (B, 1, 1, 1) to multiply results by: NaN where `seen` couldn't say what was asked


class Frame(NamedTuple):
    """What all layers of one forward share."""

    scores: Scores
    tables: Any  # of the position method
    cache: KVCache | None  # keys and values of earlier tokens


class Places(NamedTuple):
    """Where the tokens of a forward stand."""

    queries: Tensor  # (1 or B, T), or what the position method made of them
    keys: Tensor  # (1 or B, S)
    counted: bool  # by the body itself, so that they rise by one from token to token


def frames(limits: Iterable[Limits], visible: Visible, position: PositionMethod, places: Places, *, heads: int,
           width: int, dtype: torch.dtype, cache: KVCache | None = None) -> dict[Limits, Frame]:  # fmt: skip
    """A frame for all limits that layers have.

    Args:
        visible: who sees whom; its own window and layout are not read.
        heads: H. width: D. dtype: that of the products.
    """
    tables = position.tables(places.queries)
    biases = _Biases(visible, position, places)
    return {each: Frame(scores(_limited(visible, each, heads), biases, width=width, dtype=dtype), tables, cache)
            for each in limits}  # fmt: skip


def _limited(visible: Visible, limits: Limits, heads: int) -> Visible:
    layout = None
    if limits.layout is not None:
        layout = layout_for(limits.layout, visible.keys, heads, visible.causal, visible.device)
    return Visible(queries=visible.queries, keys=visible.keys, causal=visible.causal, device=visible.device,
                   window=limits.window, layout=layout, real=visible.real, documents=visible.documents,
                   starts=visible.starts, prefix=visible.prefix)  # fmt: skip


class _Biases:
    """The bias of a position method, as a function of the distance or as a square, each made at most once."""

    def __init__(self, visible: Visible, position: PositionMethod, places: Places):
        self.visible, self.position, self.places = visible, position, places
        self._square: Tensor | None = None
        self._described: DistanceBias | None = None

    @property
    def form(self) -> str | None:
        """As the dispatcher wants it."""
        if not self.position.biased:
            return None
        slots = self.places.counted or self.visible.queries == self.visible.keys  # else keys may stand anywhere
        return self.position.bias_form if slots and self.position.bias_form else "any"

    def square(self) -> Tensor | None:
        """(1 or B, H, T, S)."""
        if self._square is None and self.position.biased:
            self._square = self.position.bias(self.places.queries, self.places.keys)
        return self._square

    def by_distance(self) -> DistanceBias | None:
        """For kernels, which know slots alone: NaN where given positions don't rise with them."""
        if self._described is None and self.position.biased:
            self._described = self.position.distance_bias(self.visible.keys, self.visible.device)
            if not self.places.counted:
                fine = consecutive(self.places.queries, self.visible.documents, self.visible.real)
                self._described = self._described.times(torch.where(fine, 1.0, float("nan")))
        return self._described


def scores(visible: Visible, biases: _Biases | None = None, *, width: int, dtype: torch.dtype) -> Scores:
    """What `attend` needs for these keys and this bias, by the kernel that the dispatcher picks."""
    kind, square = visible.kind, visible.queries == visible.keys
    if visible.layout is not None and visible.real is not None and not torch.is_grad_enabled():
        kind = "irregular"  # prompts are padded on the left, where kernels, which know slots alone, would cut them elsewhere
    block = visible.layout.block if visible.layout else 0
    path = choice(visible.device.type, dtype, width, kind, biases.form if biases else None, square,
                  visible.queries == 1, torch.is_grad_enabled(), visible.crowded, block)  # fmt: skip
    if path == "luban":
        from luban.kernels.flash.attention import prepared

        fine = visible.sound()
        sound = None if fine is None else torch.where(fine, 1.0, float("nan"))[:, None, None, None]
        seen = None if kind == "causal" else prepared(visible.intervals(), visible.keys)
        return Scores(path, causal=kind == "causal", seen=seen, bias=biases.by_distance() if biases else None,
                      layout=visible.layout, sound=sound)  # fmt: skip
    if path == "flash4" and kind == "packed":
        return Scores(path, causal=True, backward_only=True, edges=_any_number(visible.edges()))
    added = biases.square() if biases else None
    if added is None and visible.layout is None and (kind == "all" or (kind == "causal" and square)):
        return Scores(path, causal=kind == "causal", backward_only=kind == "causal")
    added = torch.zeros((), device=visible.device) if added is None else added
    mask = torch.where(visible.dense(), added, float("-inf")).to(dtype)
    return Scores(path, mask=mask, backward_only=square and visible.causal and visible.prefix is None)


def _any_number(edges: Tensor) -> Tensor:
    """The same; blocks that are compiled one by one then have one graph for any number of documents."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(edges, 0)
    return edges


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which products over `x` run: autocast's, where it is on."""
    kind = x.device.type  # a list instead of torch.amp.is_autocast_available, which torch 2.11 can't trace
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else x.dtype

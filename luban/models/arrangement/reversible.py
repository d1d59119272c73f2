"""Reversible layers (Gomez et al. 2017; Reformer, Kitaev et al. 2020, section 3): y₁ = x₁ + mixer(norm(x₂)),
y₂ = x₂ + feedforward(norm(y₁)).

Consecutive reversible layers keep only what comes out of the last of them for the backward pass: each computes what went into it
from what came out. Before the first both streams are the hidden states, behind the last their mean goes on (the paper's head
reads both side by side). The streams are float32 or wider, since what is subtracted must be what was added.

B batch, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec
    from luban.nn.mixer.base import LayerShape

Streams = tuple[Tensor, Tensor]  # (B, T, E) each
Run = Sequence[tuple["ReversibleBlock", LayerContext]]  # consecutive layers


@dataclass(frozen=True, kw_only=True)
class Reversible(Arrangement):
    """Two residual streams: the mixer reads the second and adds to the first, the feed-forward network the other way round."""

    reversible: ClassVar[bool] = True
    undivided: ClassVar[frozenset[str]] = frozenset({"shard", "tensor", "context", "pipeline"})
    chunks: int = 1  # pieces of a row that the feed-forward network reads one after another, to save memory

    def __post_init__(self):
        if self.chunks < 1:
            raise ConfigError(f"a reversible arrangement's chunks must be at least 1, {self.chunks} given")

    def check(self, layer: LayerSpec) -> None:
        """No cross-attention and no mixture of experts."""
        super().check(layer)
        if not layer.feedforward.tokenwise:
            raise ConfigError(
                "reversible layers compute their feed-forward network twice and in pieces, which a mixture of experts can't be: "
                "use a plain or gated network there, or another arrangement"
            )

    def build(self, layer: LayerSpec, shape: LayerShape) -> ReversibleBlock:
        """The block."""
        return ReversibleBlock(layer, shape, self.chunks)

    def describe_streams(self, parts: LayerParts, x1: GraphTensor, x2: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
        """Record y₁ and y₂ of a layer, of which nothing is saved."""
        wide = "float64" if parts.graph.dtype == "float64" else "float32"

        def plus(name: str, x: GraphTensor, y: GraphTensor) -> GraphTensor:
            return parts.graph.add(f"{name}_residual", "add", x, y, shape=x.shape, dtype=wide)

        y1 = plus("mixer", x1, parts.mixer(parts.norm("mixer_norm", x2)))
        return y1, plus("feedforward", x2, parts.feedforward(parts.norm("feedforward_norm", y1)))


class ReversibleBlock(Block):
    """One reversible layer."""

    reversible: ClassVar[bool] = True

    def __init__(self, layer: LayerSpec, shape: LayerShape, chunks: int):
        super().__init__(layer, shape)
        self.chunks = chunks

    def forward(self, x1_BTE: Tensor, x2_BTE: Tensor, dtype: torch.dtype, ctx: LayerContext) -> Streams:  # type: ignore[override]
        """Both streams in and out; `dtype` of what norms, mixer and feed-forward network read."""
        y1_BTE = x1_BTE + self.mixed(x2_BTE, dtype, ctx)
        pieces = y1_BTE.chunk(self.chunks, dim=1)
        fed_BTE = torch.cat([self.fed(piece, dtype, ctx) for piece in pieces], 1) if self.chunks > 1 else None
        return y1_BTE, x2_BTE + (self.fed(y1_BTE, dtype, ctx) if fed_BTE is None else fed_BTE)

    @property
    def mixer_parts(self) -> tuple[nn.Module | None, ...]:
        """The modules that `mixed` runs."""
        return self.mixer_norm, self.mixer, self.beside_mixer

    @property
    def feedforward_parts(self) -> tuple[nn.Module | None, ...]:
        """The modules that `fed` runs."""
        return self.feedforward_norm, self.feedforward, self.beside_feedforward

    def mixed(self, x_BTE: Tensor, dtype: torch.dtype, ctx: LayerContext) -> Tensor:
        """What the mixer makes of a stream."""
        return self.run_mixer(self.mixer_norm(x_BTE.to(dtype)), ctx)

    def fed(self, x_BTE: Tensor, dtype: torch.dtype, ctx: LayerContext) -> Tensor:
        """What the feed-forward network makes of a stream, or of some of its tokens."""
        return self.run_feedforward(self.feedforward_norm(x_BTE.to(dtype)))


@torch._disable_dynamo  # torch.compiler.disable, which would import all of torch._dynamo now
def run_reversible(x_BTE: Tensor, layers: Run) -> Tensor:
    """(B, T, E) → (B, T, E) through consecutive reversible layers. Raises UnsupportedError for trained keys and values before
    every text, whose gradients would be lost."""
    dtype, wide = x_BTE.dtype, torch.promote_types(x_BTE.dtype, torch.float32)
    if any(ctx.prefix is not None for _, ctx in layers):
        raise UnsupportedError("adapters with prompts (prefix, prompt) don't go with reversible layers: use lora")
    x1_BTE = x2_BTE = x_BTE.to(wide)
    if not torch.is_grad_enabled():
        for block, ctx in layers:
            x1_BTE, x2_BTE = block(x1_BTE, x2_BTE, dtype, ctx)
    else:
        trained = [p for block in dict.fromkeys(b for b, _ in layers) for p in block.parameters() if p.requires_grad]
        # What is recomputed is cut off from x and parameters: both are handed in for autograd to see them.
        x1_BTE, x2_BTE = _Recomputed.apply(x1_BTE, x2_BTE, dtype, layers, *trained)
    return ((x1_BTE + x2_BTE) / 2).to(dtype)


class _Recomputed(torch.autograd.Function):
    """Layers whose inputs are computed again from their outputs in the backward pass."""

    @staticmethod
    def forward(fctx: Any, x1: Tensor, x2: Tensor, dtype: torch.dtype, layers: Run, *trained: Tensor) -> Streams:
        """The layers one after another, without a graph."""
        for block, ctx in layers:
            x1, x2 = block(x1, x2, dtype, ctx)
        fctx.dtype, fctx.layers, fctx.trained = dtype, layers, trained
        fctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    def backward(fctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of both streams and of every parameter."""
        (y1, y2), (d1, d2) = fctx.saved_tensors, gradients
        sums: dict[int, Tensor] = {}
        for block, ctx in reversed(fctx.layers):
            pieces = [
                _term(block.fed, block.feedforward_parts, y, d, fctx.dtype, ctx, sums)
                for y, d in zip(y1.chunk(block.chunks, dim=1), d2.chunk(block.chunks, dim=1), strict=True)
            ]
            fed, back = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
            x2, d1 = y2 - fed, d1 + back
            mixed, back = _term(block.mixed, block.mixer_parts, x2, d1, fctx.dtype, ctx, sums)
            y1, y2, d2 = y1 - mixed, x2, d2 + back
        return d1, d2, None, None, *(sums.get(id(parameter)) for parameter in fctx.trained)


def _term(
    function: Any,
    owners: tuple[nn.Module | None, ...],
    x: Tensor,
    dy: Tensor,
    dtype: torch.dtype,
    ctx: LayerContext,
    sums: dict[int, Tensor],
) -> Streams:
    """(function(x), its gradient with respect to x for the gradient dy); those of the owners' parameters are added to `sums`."""
    trained = [p for owner in owners if owner for p in owner.parameters() if p.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = function(x, dtype, ctx)
        back, *found = torch.autograd.grad(y, (x, *trained), dy.to(y.dtype), allow_unused=True)
    for parameter, gradient in zip(trained, found, strict=True):
        if gradient is not None:
            sums[id(parameter)] = sums[id(parameter)] + gradient if id(parameter) in sums else gradient
    return y.detach(), back

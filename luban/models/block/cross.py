"""A decoder's block that also looks at what an encoder read: self-attention, cross-attention, feed-forward.

B batch, T decoder tokens, S encoder tokens, E model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, masked, seen_share, within
from luban.models.block.family import Block
from luban.models.block.post import PostNorm
from luban.models.block.pre import PreNorm
from luban.nn.attention.cross import CrossAttention
from luban.nn.attention.grouped import Grouped
from luban.nn.attention.mask import Frame, Scores
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class Memory(NamedTuple):
    """What an encoder read, as every layer of the decoder needs it."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values (B, K, S, D) a layer
    scores: Scores  # hides padding


class CrossBlock(nn.Module):
    """The parts of both arrangements."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        assert isinstance(spec.attention, Grouped)
        self.attention_norm = spec.norm.build(spec.width)
        self.attention = spec.attention.build(spec.width)
        self.cross_norm = spec.norm.build(spec.width)
        self.cross = CrossAttention(spec.attention, spec.width)
        self.feedforward_norm = spec.norm.build(spec.width)
        self.feedforward = spec.feedforward.build(spec.width)


class PreNormCrossBlock(CrossBlock):
    """x + part(norm(x)), three times."""

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int, memory: Memory) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), frame, position, layer)
        x_BTE = x_BTE + self.cross.look(self.cross_norm(x_BTE), memory.layers[layer], memory.scores)
        return x_BTE + self.feedforward(self.feedforward_norm(x_BTE))


class PostNormCrossBlock(CrossBlock):
    """norm(x + part(x)), three times."""

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int, memory: Memory) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.attention_norm(x_BTE + self.attention(x_BTE, frame, position, layer))
        x_BTE = self.cross_norm(x_BTE + self.cross.look(x_BTE, memory.layers[layer], memory.scores))
        return self.feedforward_norm(x_BTE + self.feedforward(x_BTE))


ARRANGEMENTS: dict[type[Block], type[CrossBlock]] = {PreNorm: PreNormCrossBlock, PostNorm: PostNormCrossBlock}


def require_cross(spec: ModelSpec) -> None:
    """Raise ConfigError where this arrangement or attention has no form with cross-attention."""
    if type(spec.block) not in ARRANGEMENTS or not isinstance(spec.attention, Grouped):
        raise ConfigError("an encoder–decoder needs block pre or post and attention grouped: the others have no "
                          "form with cross-attention")  # fmt: skip


def cross_block(spec: ModelSpec) -> CrossBlock:
    """The decoder's block of this model."""
    return ARRANGEMENTS[type(spec.block)](spec)


def cross_ops(spec: ModelSpec, batch: int, seq: int, source: int) -> list[Op]:
    """What one such block does with `seq` tokens of its own and `source` of the encoder's."""
    cross = [_over(op, seq, source) for op in spec.attention.ops(batch, seq, spec.width)]
    return [*masked(spec.block.ops(spec, batch, seq), seen_share(seq, None, causal=True)),
            spec.norm.op("cross_norm", batch * seq, spec.width), *within("cross", cross)]  # fmt: skip


def _over(op: Op, seq: int, source: int) -> Op:
    """An operation of attention whose keys are the source's tokens instead of its own `seq`."""
    of_source = op.name in ("k", "v", "k_norm")
    return replace(op, flops=op.flops * source // seq if of_source or op.kind == "attention" else op.flops,
                   activation=op.activation * source // seq if of_source else op.activation)  # fmt: skip

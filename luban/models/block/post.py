"""Post-norm, one after the other (the original Transformer, GPT-1, BERT): norm(x + attention(x)), then norm(x + feedforward(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from luban.core.opgraph import Op, within
from luban.models.block.family import Block
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class PostNorm(Block):
    """Each part reads the stream as it is; what comes out of the sum is normalised (Vaswani et al. 2017, section 3.1)."""

    final_norm = False

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return PostNormBlock(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Attention, feed-forward, a norm behind each."""
        tokens = batch * seq
        return [
            *within("attention", spec.attention.ops(batch, seq, spec.width)),
            spec.norm.op("attention_norm", tokens, spec.width),
            *within("feedforward", spec.feedforward.ops(tokens, spec.width)),
            spec.norm.op("feedforward_norm", tokens, spec.width),
        ]


class PostNormBlock(nn.Module):
    """One layer of a post-norm Transformer."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.attention = spec.attention.build(spec.width)
        self.attention_norm = spec.norm.build(spec.width)
        self.feedforward = spec.feedforward.build(spec.width)
        self.feedforward_norm = spec.norm.build(spec.width)

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = self.attention_norm(x_BTE + self.attention(x_BTE, frame, position, layer))
        return self.feedforward_norm(x_BTE + self.feedforward(x_BTE))

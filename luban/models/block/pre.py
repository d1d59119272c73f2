"""Pre-norm, one after the other (GPT-2, LLaMA): x + attention(norm(x)), then x + feedforward(norm(x))."""

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
class PreNorm(Block):
    """Each part reads the normalised stream and adds to the plain one."""

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return PreNormBlock(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Two norms, attention, feed-forward."""
        tokens = batch * seq
        return [
            spec.norm.op("attention_norm", tokens, spec.width),
            *within("attention", spec.attention.ops(batch, seq, spec.width)),
            spec.norm.op("feedforward_norm", tokens, spec.width),
            *within("feedforward", spec.feedforward.ops(tokens, spec.width)),
        ]


class PreNormBlock(nn.Module):
    """One layer of a pre-norm Transformer."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.attention_norm = spec.norm.build(spec.width)
        self.attention = spec.attention.build(spec.width)
        self.feedforward_norm = spec.norm.build(spec.width)
        self.feedforward = spec.feedforward.build(spec.width)

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        x_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), frame, position, layer)
        return x_BTE + self.feedforward(self.feedforward_norm(x_BTE))

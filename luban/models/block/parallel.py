"""Parallel (PaLM, Chowdhery et al. 2022, section 2; Falcon): x + attention(norm(x)) + feedforward(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, within
from luban.models.block.family import Block
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Parallel(Block):
    """Both parts read the same stream."""

    norms: int = 1  # 1: both read one norm (PaLM, Falcon 7B); 2: each has its own (Falcon 40B, GPT-NeoX)

    def __post_init__(self):
        if self.norms not in (1, 2):
            raise ConfigError(f"a parallel block has 1 or 2 norms, {self.norms} given")

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return ParallelBlock(spec, self.norms)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One norm or two, attention, feed-forward."""
        tokens = batch * seq
        names = ("attention_norm", "feedforward_norm")[: self.norms]
        return [
            *(spec.norm.op(name, tokens, spec.width) for name in names),
            *within("attention", spec.attention.ops(batch, seq, spec.width)),
            *within("feedforward", spec.feedforward.ops(tokens, spec.width)),
        ]


class ParallelBlock(nn.Module):
    """One layer of a parallel Transformer."""

    def __init__(self, spec: ModelSpec, norms: int):
        super().__init__()
        self.attention_norm = spec.norm.build(spec.width)
        self.attention = spec.attention.build(spec.width)
        self.feedforward_norm = spec.norm.build(spec.width) if norms == 2 else None
        self.feedforward = spec.feedforward.build(spec.width)

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        read = self.attention_norm(x_BTE)
        other = read if self.feedforward_norm is None else self.feedforward_norm(x_BTE)
        return x_BTE + self.attention(read, frame, position, layer) + self.feedforward(other)

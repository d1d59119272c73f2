"""Parallel (PaLM, Chowdhery et al. 2022, section 2; Falcon): x + mixer(norm(x)) + feedforward(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.errors import ConfigError
from luban.core.opgraph import GraphTensor
from luban.models.arrangement.base import Arrangement, Block, LayerParts
from luban.nn.context import LayerContext
from luban.nn.mixer.base import LayerShape

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec


class ParallelBlock(Block):
    """One layer of a parallel Transformer."""

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__(layer, shape)
        assert isinstance(layer.arrangement, Parallel)
        if layer.arrangement.norms == 1:
            self.feedforward_norm = None

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        normed = self.mixer_norm(x_BTE)
        other = normed if self.feedforward_norm is None else self.feedforward_norm(x_BTE)
        return x_BTE + self.run_mixer(normed, ctx) + self.run_feedforward(other, ctx)


@dataclass(frozen=True, kw_only=True)
class Parallel(Arrangement):
    """Mixer and feed-forward network read the same residual."""

    block = ParallelBlock
    norms: int = 1  # 1: both read one norm (PaLM, Falcon 7B); 2: each has its own (Falcon 40B, GPT-NeoX)

    def __post_init__(self):
        if self.norms not in (1, 2):
            raise ConfigError(f"a parallel arrangement has 1 or 2 norms, {self.norms} given")

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """x + mixer(norm(x)) + feedforward(norm(x)), one norm or two."""
        normed = parts.norm("mixer_norm", x_BTE)
        other = normed if self.norms == 1 else parts.norm("feedforward_norm", x_BTE)
        return parts.residual("parallel", x_BTE, parts.mixer(normed), parts.feedforward(other))

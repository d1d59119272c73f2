"""Parallel adapters: a bottleneck that reads what a layer's part reads and adds to what it gives (He et al. 2022, section
3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from luban.adapters.bottleneck import Bottleneck, BottleneckConfig
from luban.core.errors import UnsupportedError
from luban.models.base import Model
from luban.models.spec import ModelSpec
from luban.models.stack import blocks_of


@dataclass(frozen=True, kw_only=True)
class Parallel(BottleneckConfig):
    """One a layer, beside the feed-forward network (the paper's best place) or the mixer."""

    beside: Literal["feedforward", "mixer"] = "feedforward"  # the part of the layer

    def check(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError for a model without Transformer layers."""
        if not spec.body.stacked:
            raise UnsupportedError("a parallel adapter stands in Transformer layers, which this model hasn't")

    def insert(self, model: Model) -> None:
        """Put a bottleneck beside the part of every layer."""
        for block in blocks_of(model):
            block.add_beside(self.beside, Beside(model.spec.width, self))


class Beside(Bottleneck):
    """What is added to the output of the part of a layer that reads x."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.bottleneck(x)

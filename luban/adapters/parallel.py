"""Parallel adapters: a bottleneck that reads what a layer's part reads and adds to what it gives (He et al. 2022, section
3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from luban.adapters.bottleneck import Bottleneck, BottleneckConfig
from luban.core.errors import UnsupportedError
from luban.models.arrangement.base import Block
from luban.models.base import Model


@dataclass(frozen=True, kw_only=True)
class Parallel(BottleneckConfig):
    """One a layer, beside the feed-forward network (the paper's best place) or the mixer."""

    beside: Literal["feedforward", "mixer"] = "feedforward"  # the part of the layer

    def insert(self, model: Model) -> None:
        """Put a bottleneck beside the part of every layer. Raises UnsupportedError for a model without Transformer layers."""
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        if not blocks:
            raise UnsupportedError("a parallel adapter stands in Transformer layers, which this model hasn't")
        for block in blocks:
            adapter = Beside(model.spec.width, self)
            block.add_module(f"beside_{self.beside}", adapter)
            part: nn.Module = getattr(block, self.beside)
            part.register_forward_hook(adapter.add)


class Beside(Bottleneck):
    """part(x) + bottleneck(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.bottleneck(x)

    def add(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The part's output with the bottleneck's; a forward hook of the part."""
        return output + self(inputs[0])

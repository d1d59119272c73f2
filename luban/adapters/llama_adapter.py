"""LLaMA-Adapter: prompts that the upper layers attend to in a softmax of their own, gated by zero (Zhang et al. 2023,
equations 3 to 8).

B batch, H query heads, K key heads, T tokens, P prompt tokens, D head dim, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig
from luban.core.errors import ConfigError, UnsupportedError
from luban.models.base import Model
from luban.models.spec import ModelSpec
from luban.models.stack import blocks_of
from luban.nn.init import InitialValues
from luban.nn.roles import Role

KeysValuesOf = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(AdapterConfig):
    """Prompts in the upper layers of a decoder. Gates are those of the paper, one a head, without the released code's tanh."""

    length: int = 10  # P, prompt tokens of a layer
    layers: int = 0  # upper layers that have prompts (0: all; the paper: 30 of 32)

    def __post_init__(self):
        if self.length < 1 or self.layers < 0:
            raise ConfigError("adapter.length must be at least 1 and adapter.layers at least 0")

    def check(self, spec: ModelSpec) -> None:
        """Raise for what isn't a decoder, and for more layers than there are."""
        if not (spec.body.stacked and spec.body.causal):
            raise UnsupportedError("a LLaMA-Adapter needs a decoder")
        if not all(layer.mixer.prompted and layer.share is None for layer in spec.layers):
            raise UnsupportedError(
                "a LLaMA-Adapter needs layers that all have softmax attention in groups of heads (mixer grouped) and weights of their own"
            )
        if self.layers > len(spec.layers):
            raise ConfigError(f"adapter.layers is {self.layers}, and the model has {len(spec.layers)} layers")

    def insert(self, model: Model) -> None:
        """Put prompts into the upper layers' attention."""
        width = model.spec.width
        upper = list(zip(model.spec.layers, blocks_of(model), strict=True))[-self.layers :]  # -0: all
        for layer, block in upper:
            shape = layer.mixer.attention(width)
            assert shape is not None
            block.mixer.add_prompts(GatedPrompts(self.length, width, shape.heads))  # type: ignore[operator]


class GatedPrompts(Adapter):
    """gate · softmax(q·kᵀ/√D)·v with keys and values of the prompts. Parameters: P·E + H."""

    parameter_roles: ClassVar[dict[str, Role]] = {"prompts": "adapter", "gate": "position"}

    def __init__(self, length: int, width: int, heads: int):
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(length, width))
        self.gate = nn.Parameter(torch.empty(heads))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Prompts normal with deviation 1, as embeddings of torch; gates zero."""
        self.prompts.copy_(draw.normal("prompts", self.prompts, 1.0))
        self.gate.zero_()

    def forward(self, q_BHTD: Tensor, keys_values: KeysValuesOf, scale: float | None) -> Tensor:
        """What is added to the mixed values of queries, (B, H, T, D) → (B, H, T, D).

        Args:
            keys_values: hidden states (B, P, E) → the layer's keys and values (B, K, P, D) of them, without positions.
            scale: of the scores; None: 1/√D.
        """
        k, v = (part.expand(q_BHTD.shape[0], -1, -1, -1) for part in keys_values(self.prompts[None]))
        groups = q_BHTD.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1).to(q_BHTD.dtype) for part in (k, v))
        return self.gate[:, None, None] * F.scaled_dot_product_attention(q_BHTD, k, v, scale=scale)

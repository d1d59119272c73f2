"""LLaMA-Adapter: prompts that the upper layers attend to in a softmax of their own, gated by zero (Zhang et al. 2023,
equations 3 to 8).

B batch, H query heads, K key heads, T tokens, P prompt tokens, D head dim, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig
from luban.core.errors import ConfigError, UnsupportedError
from luban.models.base import Model
from luban.models.decoder import DecoderBody
from luban.models.spec import ModelSpec
from luban.nn.init import InitialValues
from luban.nn.mixer.grouped import GroupedAttention
from luban.nn.roles import Role


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
        if not isinstance(spec.body, DecoderBody):
            raise UnsupportedError("a LLaMA-Adapter needs a decoder")
        if self.layers > len(spec.layers):
            raise ConfigError(f"adapter.layers is {self.layers}, and the model has {len(spec.layers)} layers")

    def insert(self, model: Model) -> None:
        """Put prompts into the upper layers' attention. Raises UnsupportedError for layers that mix in another way."""
        mixers = [module for module in model.modules() if isinstance(module, GroupedAttention)]
        if len(mixers) < len(model.spec.layers):
            raise UnsupportedError(
                "a LLaMA-Adapter needs layers that all have softmax attention in groups of heads (mixer grouped)"
            )
        for mixer in mixers[-self.layers or None :] if self.layers else mixers:
            heads = mixer.qkv.sizes["q"] // mixer.head_dim
            mixer.prompts = GatedPrompts(self.length, model.spec.width, heads)


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

    def forward(self, q_BHTD: Tensor, mixer: GroupedAttention) -> Tensor:
        """(B, H, T, D)."""
        k, v = (part.expand(q_BHTD.shape[0], -1, -1, -1) for part in mixer.keys_values(self.prompts[None]))
        groups = q_BHTD.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(groups, 1).to(q_BHTD.dtype) for part in (k, v))
        return self.gate[:, None, None] * F.scaled_dot_product_attention(q_BHTD, k, v, scale=mixer.scale)

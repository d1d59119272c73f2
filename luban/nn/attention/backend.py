"""How a forward computes attention: kernels over what it is given, or over keys and values that a cache keeps as well.

B batch, H query heads, K key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luban.core.protocols import KVCache
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.dispatch import check_kernel
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import Bias, limited, prepare
from luban.nn.mixer.base import AttentionShape


class NewTokens(NamedTuple):
    """Where the new tokens of a forward stand among those that a backend keeps."""

    positions: Tensor  # (1 or B, T)
    key_positions: Tensor  # (1 or B, S), of all tokens that the mask speaks of
    token_mask: Tensor | None  # (B, S) bool, true where such a token is real; None: all are


class AttentionBackend:
    """Attention by kernels, nothing kept: for training and for whole sequences.

    Args:
        kernel: asked for by name (`luban.kernels.dispatch`); None or "auto": the fastest that can serve.

    Raises:
        ConfigError: an unknown kernel.
    """

    cached = False  # whether keys grow from call to call: then `begin` counts the positions

    def __init__(self, kernel: str | None = None):
        self.kernel = check_kernel(kernel)

    def begin(self, tokens: int, mask: Tensor | None) -> NewTokens | None:
        """Called once a forward, before any layer, with the number T of new tokens and (B, T) bool, which of them are
        real (None: all). None where nothing is kept from call to call."""
        return None

    def layer(self, index: int) -> Any:
        """What layer `index` keeps from call to call, which `attend` is given; None: nothing."""
        return None

    def prepare(self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype) -> Any:
        """Mask and bias as `attend` takes them, made once a forward for all layers of one shape.

        Args:
            mask: without the layers' window or layout.
            dtype: of the matmuls.
        """
        return prepare(limited(mask, shape), bias, head_dim=shape.head_dim, dtype=dtype, kernel=self.kernel)

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """(B, H, T, D) of queries, keys and values of the new tokens.

        Args:
            mask: from `prepare`. cache: from `layer`.
        """
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the encoder's states."""
        assert states is not None
        return project(states)


class CachedAttention(AttentionBackend):
    """The same with a contiguous cache, which takes up the keys and values of the new tokens first."""

    cached = True

    def __init__(self, cache: KVCache, kernel: str | None = None):
        super().__init__(kernel)
        self.cache = cache

    def begin(self, tokens: int, mask: Tensor | None) -> NewTokens:
        """Slots in the cache."""
        positions = self.cache.begin(tokens, mask)
        return NewTokens(positions, self.cache.positions, self.cache.valid)

    def layer(self, index: int) -> Any:
        """The layer's keys and values."""
        return self.cache.layer(index)

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """(B, H, T, D), over all keys and values where the layer has a cache."""
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD)
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Projected in the first call, kept for the later ones."""
        assert cache is not None
        return cache.cross(project, states)

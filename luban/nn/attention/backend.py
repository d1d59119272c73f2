"""How a forward computes attention: kernels over what it is given, or over keys and values that a cache keeps as well.

B batch, H query heads, K key heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from luban.core.protocols import KVCache, LayerCache
from luban.kernels.dispatch import check_kernel
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import PreparedMask


class AttentionBackend:
    """Attention by kernels, nothing kept: for training and for whole sequences.

    Args:
        kernel: asked for by name (`luban.kernels.dispatch`); None or "auto": the fastest that can serve.

    Raises:
        ConfigError: an unknown kernel.
    """

    cached = False  # whether keys grow from call to call

    def __init__(self, kernel: str | None = None):
        self.kernel = check_kernel(kernel)

    def layer(self, index: int) -> LayerCache | None:
        """What layer `index` keeps from call to call."""
        return None

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        mask: PreparedMask,
        cache: LayerCache | None,
        scale: float | None,
    ) -> Tensor:
        """(B, H, T, D) of queries, keys and values of the new tokens."""
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor | None, cache: LayerCache | None
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

    def layer(self, index: int) -> LayerCache | None:
        """The layer's keys and values."""
        return self.cache.layer(index)

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        mask: PreparedMask,
        cache: LayerCache | None,
        scale: float | None,
    ) -> Tensor:
        """(B, H, T, D), over all keys and values where the layer has a cache."""
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD)
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Projected in the first call, kept for the later ones."""
        assert cache is not None
        return cache.cross(project, states)

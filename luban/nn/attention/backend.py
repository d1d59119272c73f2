"""Attention backends: uncached, or with a KV cache.

B batch, H query heads, K key heads, T queries, S keys, D head dim, E model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from luban.core.protocols import KeysValues, KVCache, LayerCache
from luban.kernels.dispatch import check_kernel
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import PreparedMask


class AttentionBackend:
    """Attention without a cache, for training and full sequences.

    Args:
        kernel: name of the kernel to use (`luban.kernels.dispatch`); None or "auto": the fastest that supports the case.

    Raises:
        ConfigError: an unknown kernel.
    """

    cached = False  # true: keys and values of earlier calls are attended to as well

    def __init__(self, kernel: str | None = None):
        self.kernel = check_kernel(kernel)

    def layer(self, index: int) -> LayerCache | None:
        """The cache of layer `index`; None without one."""
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
        """Attention, (B, H, T, D).

        Args:
            q_BHTD, k_BKTD, v_BKTD: of the new tokens; without a cache keys and values may have another length, S for T.
            scale: replaces 1/√D.
        """
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], KeysValues], states: Tensor | None, cache: LayerCache | None
    ) -> KeysValues:
        """Keys and values, (B, K, S, D) each, of the encoder's states (B, S, E)."""
        assert states is not None
        return project(states)


class CachedAttention(AttentionBackend):
    """Attention over a contiguous KV cache; the new keys and values are appended first."""

    cached = True

    def __init__(self, cache: KVCache, kernel: str | None = None):
        super().__init__(kernel)
        self.cache = cache

    def layer(self, index: int) -> LayerCache | None:
        """The cache of layer `index`; None for a layer without one."""
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
        """Attention, (B, H, T, D), over all cached keys and values; without a layer cache, over the given ones."""
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD)
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], KeysValues], states: Tensor | None, cache: LayerCache | None
    ) -> KeysValues:
        """Keys and values, (B, K, S, D) each. Projected on the first call and kept in the cache."""
        assert cache is not None
        return cache.cross(project, states)

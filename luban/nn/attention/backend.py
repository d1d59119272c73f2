"""Attention backends: uncached, or with a KV cache.

B batch, H query heads, K key heads, T queries, S keys, D head dim, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.core.protocols import KeysValues, KVCache
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.dispatch import check_kernel
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import Bias, PreparedMask, limited, prepare
from luban.nn.mixer.base import AttentionShape


class NewTokens(NamedTuple):
    """Where the new tokens of a forward stand among those that a backend keeps."""

    positions: Tensor  # (1 or B, T)
    key_positions: Tensor  # (1 or B, S), of all tokens that the mask speaks of
    token_mask: Tensor | None  # (B, S) bool, true where such a token is real; None: all are


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

    def begin(self, tokens: int, token_mask: Tensor | None, positions: Tensor | None) -> NewTokens | None:
        """Called once a forward, before any layer. None where nothing is kept from call to call.

        Args:
            tokens: T, the number of new tokens. token_mask: (B, T) bool, false where padding; None: no padding.
            positions: (B, T) or (1, T) of the new tokens; None: computed here.
        """
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
        """Attention, (B, H, T, D).

        Args:
            q_BHTD, k_BKTD, v_BKTD: of the new tokens; without a cache keys and values may have another length, S for T.
            mask: from `prepare`. cache: from `layer`.
            scale: replaces 1/√D.
        """
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def prepare_prefixed(
        self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype
    ) -> Tensor:
        """The mask as `attend_prefixed` takes it, (1 or B, 1 or H, T, S) to add to the scores; arguments as in `prepare`."""
        limit = limited(mask, shape)
        added = torch.zeros((), device=mask.device) if bias is None else bias.dense()
        assert added is not None
        return torch.where(limit.dense(), added, float("-inf")).to(dtype)

    def attend_prefixed(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        prefix: KeysValues,
        mask: Tensor,
        cache: Any,
        scale: float | None,
    ) -> Tensor:
        """Attention to a prefix that all queries see and to the unmasked keys, in one softmax: (B, H, T, D).

        Args:
            prefix: keys and values (1, K, P, D). mask: from `prepare_prefixed`.

        Raises:
            UnsupportedError: this backend can't.
        """
        batch, count = k_BKTD.shape[0], prefix[0].shape[2]
        k_BKTD, v_BKTD = self.all_keys_values(k_BKTD, v_BKTD, cache)
        k, v = (
            torch.cat([first.to(then.dtype).expand(batch, -1, -1, -1), then], 2)
            for first, then in zip(prefix, (k_BKTD, v_BKTD), strict=True)
        )
        return attention(q_BHTD, k, v, PreparedMask(dense=F.pad(mask, (count, 0))), scale)

    def all_keys_values(self, k_BKTD: Tensor, v_BKTD: Tensor, cache: Any) -> KeysValues:
        """Keys and values of all tokens, (B, K, S, D) each, those of the new tokens included. Raises UnsupportedError where
        they don't lie in one tensor."""
        if type(self) is not AttentionBackend:
            raise UnsupportedError(f"{type(self).__name__} doesn't support adapters with prompts (prefix, prompt)")
        return k_BKTD, v_BKTD

    def cross_attend(
        self,
        q_BHTD: Tensor,
        project: Callable[[Tensor], KeysValues],
        states_BSE: Tensor | None,
        mask: Any,
        cache: Any,
        scale: float | None,
    ) -> Tensor:
        """Attention to an encoder's states, (B, H, T, D).

        Args:
            project: states → keys and values, (B, K, S, D) each.
            states_BSE: None: their keys and values are kept already.
            mask: of the source's padding. cache, scale: as in `attend`.
        """
        k, v = self.cross_keys_values(project, states_BSE, cache)
        return self.attend(q_BHTD, k, v, mask, None, scale)

    def cross_keys_values(
        self, project: Callable[[Tensor], KeysValues], states: Tensor | None, cache: Any
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

    def begin(self, tokens: int, token_mask: Tensor | None, positions: Tensor | None) -> NewTokens:
        """Slots in the cache."""
        positions = self.cache.begin(tokens, token_mask, positions)
        return NewTokens(positions, self.cache.positions, self.cache.valid)

    def layer(self, index: int) -> Any:
        """The cache of layer `index`; None for a layer without one."""
        return self.cache.layer(index)

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """Attention, (B, H, T, D), over all cached keys and values; without a layer cache, over the given ones."""
        if cache is not None:
            k_BKTD, v_BKTD = cache.update(k_BKTD, v_BKTD)
        return attention(q_BHTD, k_BKTD, v_BKTD, mask, scale)

    def all_keys_values(self, k_BKTD: Tensor, v_BKTD: Tensor, cache: Any) -> KeysValues:
        """The cached ones, the new ones appended."""
        return (k_BKTD, v_BKTD) if cache is None else cache.update(k_BKTD, v_BKTD)

    def cross_keys_values(
        self, project: Callable[[Tensor], KeysValues], states: Tensor | None, cache: Any
    ) -> KeysValues:
        """Keys and values, (B, K, S, D) each. Projected on the first call and kept in the cache."""
        assert cache is not None
        return cache.cross(project, states)

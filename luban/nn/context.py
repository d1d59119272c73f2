"""What the layers of one forward share, handed to every block.

Plain classes, never tuples or pytrees: FSDP's mixed precision would cast the tensors inside. What a block is given
holds tensors and objects, never its own number, so that blocks compiled one by one share one graph.

B batch, T queries, S keys or encoder tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luban.kernels.attention_mask import AttentionMask
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import bias_of, padding_mask
from luban.nn.mixer.base import AttentionShape
from luban.nn.position.base import PositionMethod, Rotation

KeysValues = tuple[Tensor, Tensor]  # (B, K, S, D) both


class EncoderStates:
    """What an encoder made of a source, for the layers of a decoder.

    Args:
        states: (B, S, E); None where every layer's keys and values are kept by a cache.
        token_mask: (B, S) bool, true where a source token is real; None: all are.
    """

    def __init__(self, states: Tensor | None, token_mask: Tensor | None, dtype: torch.dtype):
        self.states, self.token_mask = states, token_mask
        self.mask = padding_mask(token_mask, dtype)


class LayerContext:
    """What one layer is given."""

    def __init__(
        self,
        backend: AttentionBackend,
        mask: Any,
        rotation: Rotation | None,
        cache: Any,
        encoder: EncoderStates | None,
    ):
        self.backend, self.mask, self.rotation, self.cache, self.encoder = backend, mask, rotation, cache, encoder

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the new tokens to all that the mask lets them see, (B, H, T, D); `scale`: for 1/√D."""
        assert self.mask is not None
        return self.backend.attend(q_BHTD, k_BKTD, v_BKTD, self.mask, self.cache, scale)

    def cross_attend(
        self, q_BHTD: Tensor, project: Callable[[Tensor], KeysValues], scale: float | None = None
    ) -> Tensor:
        """Attention to the encoder's states, (B, H, T, D).

        Args:
            project: (B, S, E) states → keys and values; not called where a cache keeps them.
        """
        assert self.encoder is not None
        k, v = self.backend.cross_keys_values(project, self.encoder.states, self.cache)
        return self.backend.attend(q_BHTD, k, v, self.encoder.mask, None, scale)


class AttentionGroup(NamedTuple):
    """Layers whose masks are alike."""

    method: int  # which of the stack's position methods
    shape: AttentionShape


class ForwardContext:
    """What all layers of one forward share.

    Args:
        backend: how attention is computed.
        mask: without any layer's window or layout.
        positions: (1 or B, T) of the new tokens, and `key_positions` (1 or B, S) of all, as counted or given.
        counted: they were counted here, so that they rise by one from token to token.
        encoder: what decoder layers cross-attend to.
    """

    def __init__(
        self,
        *,
        backend: AttentionBackend,
        mask: AttentionMask,
        positions: Tensor,
        key_positions: Tensor,
        counted: bool,
        encoder: EncoderStates | None = None,
    ):
        self.backend, self.mask, self.encoder, self.counted = backend, mask, encoder, counted
        self.positions, self.key_positions = positions, key_positions
        self._layers: Mapping[int, LayerContext] = {}

    def map_positions(self, method: PositionMethod) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys as `method` works with them."""
        return method.map_positions(self.positions, self.key_positions, cached=self.backend.cached)

    def prepare(
        self,
        methods: Sequence[PositionMethod],
        mapped: tuple[Tensor, Tensor],
        groups: Sequence[AttentionGroup],
        group_of: Mapping[int, int | None],
        dtype: torch.dtype,
    ) -> None:
        """Make ready what `layer` gives out.

        Args:
            methods: the stack's position method, then those that single layers have.
            mapped: positions of queries and keys as the first method works with them.
            groups: of layers with like masks; `group_of` layer → group, None for a layer that doesn't attend.
            dtype: of the matmuls.
        """
        places = [mapped, *(self.map_positions(method) for method in methods[1:])]
        encodings = [method(*at) for method, at in zip(methods, places, strict=True)]
        biases = [
            bias_of(method, encoding, self.mask, at[0], counted=self.counted)
            for method, encoding, at in zip(methods, encodings, places, strict=True)
        ]
        made = []
        for method, shape in groups:
            mask = self.backend.prepare(self.mask, shape, biases[method], dtype)
            made.append((mask, encodings[method].rotation))
        contexts: dict[int | None, LayerContext] = {}
        layers = {}
        for layer, group in group_of.items():
            cache = self.backend.layer(layer)
            if cache is not None or group not in contexts:
                mask, rotation = (None, None) if group is None else made[group]
                contexts[group] = LayerContext(self.backend, mask, rotation, cache, self.encoder)
            layers[layer] = contexts[group]
        self._layers = layers

    def layer(self, index: int) -> LayerContext:
        """What layer `index` is given."""
        return self._layers[index]

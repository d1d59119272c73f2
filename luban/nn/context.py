"""State that the layers of one forward share, passed to every block.

Not tuples or pytrees, because FSDP's mixed precision casts tensors inside those. No layer index, so that separately
compiled blocks share one graph.

B batch, T queries, S keys or encoder tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luban.core.protocols import KeysValues
from luban.kernels.attention_mask import AttentionMask
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import bias_of, padding_mask
from luban.nn.mixer.base import AttentionShape
from luban.nn.position.base import PositionMethod, Rotation


class EncoderStates:
    """Encoder output that decoder layers cross-attend to.

    Args:
        states: (B, S, E); None if the cache already holds every layer's keys and values.
        token_mask: (B, S) bool, false where a source token is padding; None: no padding.
        dtype: of the matmuls.
    """

    def __init__(self, states: Tensor | None, token_mask: Tensor | None, dtype: torch.dtype):
        self.states, self.token_mask = states, token_mask
        self.mask = padding_mask(token_mask, dtype)


class RouterTraining:
    """What routers of mixtures of experts need in training; outside of it there is none, and no choice is dropped.

    Args:
        weights_B: (B,) each row's share of the step's loss, times the loss scale: the factor on its auxiliary losses.
        valid_BT: (B, T) bool, false where a token is padding; None: no padding.
        noise_BT: (B, T) uniform random numbers from [0, 1); None: no router needs them.
    """

    def __init__(self, weights_B: Tensor, valid_BT: Tensor | None = None, noise_BT: Tensor | None = None):
        self.weights_B, self.valid_BT, self.noise_BT = weights_B, valid_BT, noise_BT

    def real(self, like_BT: Tensor) -> Tensor:
        """(B, T) bool, true for tokens that aren't padding."""
        return torch.ones_like(like_BT, dtype=torch.bool) if self.valid_BT is None else self.valid_BT


class RowTokens:
    """The new tokens of a forward as mixers need them that don't attend through the backend.

    Args:
        documents_BT: (B, T) int, ascending in a row, another number for every document; None: one document a row.
        real_BT: (B, T) bool, false where a token is padding; None: no padding.
        positions_BT: (1 or B, T) of the tokens in their documents; None: from 0 on, in rows of one document without padding.
        prefix: some tokens are visible to earlier ones.
    """

    def __init__(
        self,
        documents_BT: Tensor | None,
        real_BT: Tensor | None,
        positions_BT: Tensor | None = None,
        *,
        prefix: bool = False,
    ):
        self.documents_BT, self.real_BT, self.positions_BT, self.prefix = documents_BT, real_BT, positions_BT, prefix

    def counted(self, like_BHTD: Tensor) -> Tensor:
        """(1 or B, T) positions of the tokens."""
        if self.positions_BT is not None:
            return self.positions_BT
        return torch.arange(like_BHTD.shape[-2], device=like_BHTD.device)[None]

    def without_padding(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C), 0 at padding."""
        return x_BTC if self.real_BT is None else x_BTC * self.real_BT[..., None]


class LayerContext:
    """The per-layer view of a ForwardContext: backend, mask, rotary embedding, cache, encoder states, training of routers, the
    tokens of the rows, random numbers."""

    def __init__(
        self,
        backend: AttentionBackend,
        mask: Any,
        rotation: Rotation | None,
        cache: Any,
        encoder: EncoderStates | None,
        routing: RouterTraining | None = None,
        prefix: KeysValues | None = None,
        rows: RowTokens | None = None,
        numbers: Tensor | None = None,
    ):
        self.backend, self.mask, self.rotation, self.cache, self.encoder = backend, mask, rotation, cache, encoder
        self.routing, self.prefix = routing, prefix
        self.rows, self.numbers = rows or RowTokens(None, None), numbers

    def attend(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the new tokens to the unmasked keys and to the layer's prefix, (B, H, T, D); `scale` replaces 1/√D."""
        assert self.mask is not None
        if self.prefix is not None:
            return self.backend.attend_prefixed(q_BHTD, k_BKTD, v_BKTD, self.prefix, self.mask, self.cache, scale)
        return self.backend.attend(q_BHTD, k_BKTD, v_BKTD, self.mask, self.cache, scale)

    def cross_attend(
        self, q_BHTD: Tensor, project: Callable[[Tensor], KeysValues], scale: float | None = None
    ) -> Tensor:
        """Attention to the encoder's states, (B, H, T, D).

        Args:
            project: (B, S, E) states → keys and values, (B, K, S, D) each; not called if a cache holds them.
            scale: replaces 1/√D.
        """
        assert self.encoder is not None
        return self.backend.cross_attend(q_BHTD, project, self.encoder.states, self.encoder.mask, self.cache, scale)


class AttentionGroup(NamedTuple):
    """Layers that share a mask: same position method and AttentionShape."""

    method: int  # index into the stack's position methods
    shape: AttentionShape


class ForwardContext:
    """State that all layers of one forward share.

    Args:
        backend: how attention is computed.
        mask: the mask before any layer's window or layout is applied.
        positions: (1 or B, T) of the new tokens, given or computed here.
        key_positions: (1 or B, S) of all tokens, those in the cache included.
        consecutive: positions were computed here, so they rise by one per token.
        encoder: the states that decoder layers cross-attend to.
        routing: what routers need in training; None outside of it.
        prefixes: layer → keys and values (1, K, P, D) that every token attends to beside those of its text.
        rows: the new tokens, for mixers that don't attend through the backend.
    """

    def __init__(
        self,
        *,
        backend: AttentionBackend,
        mask: AttentionMask,
        positions: Tensor,
        key_positions: Tensor,
        consecutive: bool,
        encoder: EncoderStates | None = None,
        routing: RouterTraining | None = None,
        prefixes: Mapping[int, KeysValues] | None = None,
        rows: RowTokens | None = None,
    ):
        self.backend, self.mask, self.encoder, self.consecutive = backend, mask, encoder, consecutive
        self.rows = rows
        self.routing, self.prefixes = routing, prefixes or {}
        self.positions, self.key_positions = positions, key_positions
        self._layers: Mapping[int, LayerContext] = {}

    def map_positions(self, method: PositionMethod) -> tuple[Tensor, Tensor]:
        """Query and key positions as the position method maps them: (1 or B, T) and (1 or B, S)."""
        return method.map_positions(self.positions, self.key_positions, cached=self.backend.cached)

    def prepare(
        self,
        methods: Sequence[PositionMethod],
        mapped: tuple[Tensor, Tensor],
        groups: Sequence[AttentionGroup],
        group_of: Mapping[int, int | None],
        dtype: torch.dtype,
        numbers: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Build the masks, rotary embeddings and LayerContexts.

        Args:
            methods: the model's position method, then the per-layer ones.
            mapped: query and key positions as the first method maps them.
            groups: layers that share a mask. group_of: layer → index into `groups`; None for a layer without attention.
            dtype: of the matmuls.
            numbers: layer → random numbers that its mixer reads (`Mixer.random_numbers`).
        """
        mapped_positions = [mapped, *(self.map_positions(method) for method in methods[1:])]
        encodings = [method(*positions) for method, positions in zip(methods, mapped_positions, strict=True)]
        biases = [
            bias_of(method, encoding, self.mask, positions[0], consecutive=self.consecutive)
            for method, encoding, positions in zip(methods, encodings, mapped_positions, strict=True)
        ]
        prepared = []
        for method, shape in groups:
            prepare = self.backend.prepare_prefixed if self.prefixes else self.backend.prepare
            mask = prepare(self.mask, shape, biases[method], dtype) if shape.masked else None
            prepared.append((mask, encodings[method].rotation))
        shared: dict[int | None, LayerContext] = {}  # of layers that have nothing of their own, by group
        layers = {}
        for layer, group in group_of.items():
            cache, drawn = self.backend.layer(layer), (numbers or {}).get(layer)
            prefix = self.prefixes.get(layer)
            own = cache is not None or prefix is not None or drawn is not None
            if own or group not in shared:
                mask, rotation = (None, None) if group is None else prepared[group]
                layers[layer] = LayerContext(
                    self.backend, mask, rotation, cache, self.encoder, self.routing, prefix, self.rows, drawn
                )
                if not own:
                    shared[group] = layers[layer]
            else:
                layers[layer] = shared[group]
        self._layers = layers

    def layer(self, index: int) -> LayerContext:
        """Context of layer `index`."""
        return self._layers[index]

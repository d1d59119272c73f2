"""Base config and module of position methods, and the interface that a Transformer stack calls.

B batch, T tokens, S keys, H heads, K key heads, D head dim, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant
from luban.kernels.distance import DistanceBias
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class PositionShape:
    """Model sizes that a position method depends on."""

    width: int  # E
    heads: int  # H
    head_dim: int  # D
    context: int  # longest sequence
    causal: bool = True  # tokens attend only to themselves and earlier tokens


@dataclass(frozen=True, kw_only=True)
class Position(Variant):
    """Base config of position methods (registry `position method`)."""

    registry: ClassVar[Registry] = Registry(
        "position method",
        {
            "none": "luban.nn.position.none:NoPosition",
            "learned": "luban.nn.position.learned:Learned",
            "sinusoidal": "luban.nn.position.sinusoidal:Sinusoidal",
            "rope": "luban.nn.position.rope:Rope",
            "alibi": "luban.nn.position.alibi:Alibi",
            "falcon_alibi": "luban.nn.position.falcon_alibi:FalconAlibi",
            "kerple_power": "luban.nn.position.kerple:KerplePower",
            "kerple_log": "luban.nn.position.kerple:KerpleLog",
            "t5": "luban.nn.position.t5:RelativeBias",
            "xpos": "luban.nn.position.xpos:XPos",
            "rope_2d": "luban.nn.position.two_dimensional:Rope2D",
            "learned_2d": "luban.nn.position.two_dimensional:Learned2D",
            "log_n": "luban.nn.position.logn:LogN",
            "randomised": "luban.nn.position.randomised:Randomised",
        },
    )

    embeds: ClassVar[bool] = False  # added to the token embeddings; else it acts on attention
    role: ClassVar[Role] = "position"  # of its parameters
    two_dimensional: ClassVar[bool] = False  # takes two positions a token, (B, 2, T)

    def check(self, shape: PositionShape) -> None:
        """Raise ConfigError if the method doesn't support a model of these sizes."""

    def parameters(self, shape: PositionShape) -> int:
        """Number of learned scalars."""
        return 0

    def describe_embedding(self, graph: GraphBuilder, x_BTW: GraphTensor, shape: PositionShape) -> GraphTensor:
        """Record the sum of token embeddings (B, T, W) and learned position embeddings. Fixed ones are computed from the
        positions and counted in their consumer."""
        learned = self.parameters(shape) if self.embeds else 0
        if not learned:
            return x_BTW
        return graph.add("", "embedding", x_BTW, shape=x_BTW.shape, role=self.role, parameters=learned)

    def describe_bias(self, graph: GraphBuilder, queries: int, keys: int, shape: PositionShape) -> GraphTensor | None:
        """Record the learned bias on attention scores, (1, H, queries, keys) in float32 or wider; None: no learned bias."""
        learned = 0 if self.embeds else self.parameters(shape)
        if not learned:
            return None
        dtype = "float64" if graph.dtype == "float64" else "float32"
        square = 1, shape.heads, queries, keys
        return graph.add("", "bias", shape=square, dtype=dtype, role=self.role, parameters=learned)

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        raise NotImplementedError


class Rotation:
    """Applies positions to queries and keys before their dot product; made once a forward and shared by all layers."""

    fused: bool = False  # `apply_rotary_qkv` is implemented

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, K, T, D) with positions applied; shapes and dtypes don't change."""
        raise NotImplementedError

    def apply_rotary_qkv(self, qkv_BTP: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, (H + 2K)·D), contiguous, into queries (B, H, T, D), keys and values (B, K, T, D), and apply positions
        to queries and keys; on a GPU in one kernel."""
        raise NotImplementedError


@dataclass
class PositionEncoding:
    """The rotation and bias that a position method applies to attention in one forward."""

    rotation: Rotation | None = None  # of queries and keys; None: no rotation
    distance_bias: DistanceBias | None = None  # bias on scores as a function of the distance between slots
    dense: Callable[[], Tensor] | None = None  # returns the bias (1 or B, H, T, S) float32 on the scaled scores
    _bias: Tensor | None = field(default=None, repr=False)

    @property
    def biased(self) -> bool:
        """True if there is a bias on scores."""
        return self.dense is not None

    def bias(self) -> Tensor | None:
        """The bias (1 or B, H, T, S) float32, computed once; None: no bias."""
        if self._bias is None and self.dense is not None:
            self._bias = self.dense()
        return self._bias


class PositionMethod(nn.Module):
    """Base module of position methods; by default without effect.

    A stack calls `map_positions`, `embed` and `forward` once a forward; all layers share the encoding.
    """

    bias_form: str | None = None  # form of the encoding's `DistanceBias`; None: no such bias
    by_length: bool = False  # the effect on a token depends on the length of its row, not on its position alone
    parameter_roles: ClassVar[dict[str, Role]] = {}

    @property
    def biased(self) -> bool:
        """True if it adds a bias to scores."""
        return False

    def map_positions(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """Map token positions (1 or B, T) of queries and (1 or B, S) of keys to those that this method uses; shapes don't
        change.

        Args:
            cached: with a KV cache, so the keys include those of earlier calls.
        """
        return positions, key_positions

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings (B, T, E) plus position embeddings, if any; positions (1 or B, T)."""
        return x_BTE

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """The encoding for mapped positions (1 or B, T) of queries and (1 or B, S) of keys.

        Its `distance_bias` is valid for positions that rise by one per slot.
        """
        return PositionEncoding()


class Wrapped(PositionMethod):
    """Wrapper of another method: delegates every call that it doesn't override."""

    def __init__(self, inner: PositionMethod):
        super().__init__()
        self.inner, self.bias_form, self.by_length = inner, inner.bias_form, inner.by_length

    @property
    def biased(self) -> bool:
        """As the wrapped method."""
        return self.inner.biased

    def map_positions(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """As the wrapped method."""
        return self.inner.map_positions(positions, key_positions, cached=cached)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """As the wrapped method."""
        return self.inner.embed(x_BTE, positions_BT)

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """As the wrapped method."""
        return self.inner(positions, key_positions)


def distance_encoding(bias: DistanceBias, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
    """The encoding of a bias that depends only on the distance. Positions must be below `bias.keys`.

    Args:
        positions: (1 or B, T) of queries. key_positions: (1 or B, S).
    """

    def dense() -> Tensor:
        distance_BTS = positions[:, :, None] - key_positions[:, None, :]
        return bias.table()[:, distance_BTS + bias.zero].transpose(0, 1)

    return PositionEncoding(distance_bias=bias, dense=dense)

"""Position methods: what one is, and how a Transformer stack asks it.

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
    """The sizes of the model that a position method serves."""

    width: int  # E
    heads: int  # H
    head_dim: int  # D
    context: int  # longest sequence
    causal: bool = True  # whether a token sees only those before it


@dataclass(frozen=True, kw_only=True)
class Position(Variant):
    """A family of position methods."""

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

    embeds: ClassVar[bool] = False  # adds to the token embeddings; else it acts on attention
    role: ClassVar[Role] = "position"  # of its parameters
    two_dimensional: ClassVar[bool] = False  # whether it takes two positions a token, (B, 2, T)

    def check(self, shape: PositionShape) -> None:
        """Raise ConfigError where the method can't serve a model of this shape."""

    def parameters(self, shape: PositionShape) -> int:
        """Scalars that it learns."""
        return 0

    def describe_embedding(self, graph: GraphBuilder, x_BTW: GraphTensor, shape: PositionShape) -> GraphTensor:
        """Record what a learned method adds to the token embeddings (B, T, W); the sum. What isn't learned is computed
        from positions alone, and part of the operation that reads it."""
        learned = self.parameters(shape) if self.embeds else 0
        if not learned:
            return x_BTW
        return graph.add("", "embedding", x_BTW, shape=x_BTW.shape, role=self.role, parameters=learned)

    def describe_bias(self, graph: GraphBuilder, queries: int, keys: int, shape: PositionShape) -> GraphTensor | None:
        """Record the learned bias on attention scores, (1, H, queries, keys) in float32 or wider; None: there is none."""
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
    """What is done to queries and keys before their dot product, made once a forward for all layers."""

    fused: bool = False  # whether `apply_rotary_qkv` serves it

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions in them, in their own precision."""
        raise NotImplementedError

    def apply_rotary_qkv(self, qkv_BTP: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, (H + 2K)·D), contiguous → queries (B, H, T, D), keys and values (B, K, T, D), the first two with their
        positions in them; by one kernel, in training on a GPU."""
        raise NotImplementedError


@dataclass
class PositionEncoding:
    """What a position method does to the attention of one forward."""

    rotation: Rotation | None = None  # of queries and keys; None: they stay as they are
    distance_bias: DistanceBias | None = None  # on scores, a function of the distance between slots
    dense: Callable[[], Tensor] | None = None  # makes (1 or B, H, T, S) float32 to add to the scaled scores
    _bias: Tensor | None = field(default=None, repr=False)

    @property
    def biased(self) -> bool:
        """Whether anything is added to scores."""
        return self.dense is not None

    def bias(self) -> Tensor | None:
        """(1 or B, H, T, S) float32, made once; None: nothing is added."""
        if self._bias is None and self.dense is not None:
            self._bias = self.dense()
        return self._bias


class PositionMethod(nn.Module):
    """A position method as a module; by default it does nothing.

    A stack calls `map_positions` and `embed` once a forward, and the module itself for the encoding that all layers share.
    """

    bias_form: str | None = None  # of the `DistanceBias` that its encoding has; None: there is none
    by_length: bool = False  # what it does to a token depends on how long the row is, not on the token's position alone
    parameter_roles: ClassVar[dict[str, Role]] = {}

    @property
    def biased(self) -> bool:
        """Whether it adds anything to scores."""
        return False

    def map_positions(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """Counted positions (B, T) of queries and (B, S) of keys → those that this method works with.

        `cached` says that the keys grow from call to call.
        """
        return positions, key_positions

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """The token embeddings with what the method adds to them, (B, T, E)."""
        return x_BTE

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Mapped positions (1 or B, T) of queries and (1 or B, S) of keys → the encoding.

        Its `distance_bias` holds for positions that rise by one from slot to slot.
        """
        return PositionEncoding()


class Wrapped(PositionMethod):
    """A method around another: passes everything on, except what it overrides."""

    def __init__(self, inner: PositionMethod):
        super().__init__()
        self.inner, self.bias_form, self.by_length = inner, inner.bias_form, inner.by_length

    @property
    def biased(self) -> bool:
        """As the inner method."""
        return self.inner.biased

    def map_positions(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """As the inner method."""
        return self.inner.map_positions(positions, key_positions, cached=cached)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """As the inner method."""
        return self.inner.embed(x_BTE, positions_BT)

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """As the inner method."""
        return self.inner(positions, key_positions)


def distance_encoding(bias: DistanceBias, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
    """The encoding of a bias that depends on the distance alone. Positions lie below `bias.keys`.

    Args:
        positions: (1 or B, T) of queries. key_positions: (1 or B, S).
    """

    def dense() -> Tensor:
        distance_BTS = positions[:, :, None] - key_positions[:, None, :]
        return bias.table()[:, distance_BTS + bias.zero].transpose(0, 1)

    return PositionEncoding(distance_bias=bias, dense=dense)

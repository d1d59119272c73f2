"""The family of position methods and the one interface that a body calls.

B batch, T tokens, S keys, H heads, D head width, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from luban.core.registry import Registry, Variant
from luban.kernels.distance import DistanceBias


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

    def check(self, shape: PositionShape) -> None:
        """Raise ConfigError where the method can't serve a model of this shape."""

    def parameters(self, shape: PositionShape) -> int:
        """Scalars that it learns."""
        return 0

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        raise NotImplementedError


class PositionMethod(nn.Module):
    """A position method at work; each of its ways in does nothing unless overridden.

    The body asks for `tables`, and `bias` or `distance_bias`, once a forward; all layers share them.
    """

    turns_packed: bool = False  # whether it has a `turn_packed`, `turn` on one product that holds all three

    @property
    def biased(self) -> bool:
        """Whether it adds anything to scores."""
        return type(self).bias is not PositionMethod.bias

    bias_form: str | None = None  # of what `distance_bias` gives; None: it gives nothing

    def place(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """Counted positions of queries and keys → those that all the other ways in are given.

        `cached` says that the keys grow from call to call.
        """
        return positions, key_positions

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """The token embeddings with what the method adds to them."""
        return x_BTE

    def tables(self, positions_BT: Tensor) -> Any:
        """What `turn` needs for these positions, in float32."""
        return None

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions in them."""
        return q_BHTD, k_BKTD

    def turn_packed(self, packed_BTP: Tensor, tables: Any, heads: int, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side, (B, T, (H + 2K)·D) → the three, (B, H or K, T, D), the first two
        with their positions in them; by a kernel, in training on a GPU."""
        raise NotImplementedError

    def bias(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor | None:
        """(1 or B, H, T, S) float32 to add to the scaled scores, or None."""
        return None

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias | None:
        """The same as a function of the distance, for positions that rise by one from token to token and at most
        `keys` tokens; None where there is no bias, or none of that form."""
        return None


class Wrapped(PositionMethod):
    """A method around another: passes everything on, except what it overrides."""

    def __init__(self, inner: PositionMethod):
        super().__init__()
        self.inner, self.bias_form = inner, inner.bias_form

    @property
    def biased(self) -> bool:
        """As the inner method."""
        return self.inner.biased

    def place(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """As the inner method."""
        return self.inner.place(positions, key_positions, cached=cached)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """As the inner method."""
        return self.inner.embed(x_BTE, positions_BT)

    def tables(self, positions_BT: Tensor) -> Any:
        """As the inner method."""
        return self.inner.tables(positions_BT)

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """As the inner method."""
        return self.inner.turn(q_BHTD, k_BKTD, tables)

    def bias(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor | None:
        """As the inner method."""
        return self.inner.bias(query_positions_BT, key_positions_BS)

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias | None:
        """As the inner method."""
        return self.inner.distance_bias(keys, device)

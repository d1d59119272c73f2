"""Softmax attention with heads in groups: multi-head, grouped-query (Ainslie et al. 2023) and multi-query (Shazeer 2019).

B batch, T tokens, S keys, E model width, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op
from luban.nn.attention.family import Attention
from luban.nn.attention.mask import Frame
from luban.nn.attention.product import attend
from luban.nn.linear import Dense, joint, parallel, residual_linear, trains_fused
from luban.nn.norm import Norm
from luban.nn.position.family import PositionMethod


@dataclass(frozen=True, kw_only=True)
class Grouped(Attention):
    """Multi-head when K = H, multi-query when K = 1, grouped-query between."""

    kv_heads: int | None = None  # K, must divide the query heads; none: as many
    head_dim: int | None = None  # D; none: width / heads
    qkv_bias: bool = False  # biases on queries, keys and values
    output_bias: bool = False  # bias on the output
    score_scale: float | None = None  # factor on q·k; none: 1/√D (T5: 1)
    qk_norm: Norm | None = None  # normalises every query and key over its head, before positions

    def __post_init__(self):
        if self.heads < 1 or self.key_heads() < 1 or self.heads % self.key_heads():
            raise ConfigError(f"{self.heads} query heads can't share {self.kv_heads} key heads evenly: "
                              "kv_heads must divide heads")  # fmt: skip
        if self.head_dim is not None and self.head_dim < 1:
            raise ConfigError(f"head_dim must be at least 1, {self.head_dim} given")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"attention window must be at least 1, {self.window} given")
        if self.window is not None and self.layout is not None:
            raise ConfigError("an attention window and a layout don't go together: a layout has a window of its own")
        if not self.windowed:
            raise ConfigError("windowed must say at least for one layer whether the window or the layout holds")

    def check(self, width: int) -> None:
        """Without a head_dim of their own the heads split the width."""
        if self.head_dim is None and width % self.heads:
            raise ConfigError(f"width {width} can't be split over {self.heads} heads: "
                              "choose heads that divide it, or give head_dim")  # fmt: skip

    def head_width(self, width: int) -> int:
        """D."""
        return width // self.heads if self.head_dim is None else self.head_dim

    def key_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def build(self, width: int) -> nn.Module:
        """The module."""
        return GroupedAttention(self, width)

    def ops(self, batch: int, seq: int, width: int) -> list[Op]:
        """Four dense layers, and scores and mixing over the full square (PaLM, appendix B: no causal discount)."""
        tokens, head = batch * seq, self.head_width(width)
        inner, keys = self.heads * head, self.key_heads() * head
        ops = [linear_op("q", tokens, width, inner, bias=self.qkv_bias),
               linear_op("k", tokens, width, keys, bias=self.qkv_bias),
               linear_op("v", tokens, width, keys, bias=self.qkv_bias)]  # fmt: skip
        if self.qk_norm is not None:
            ops += [self.qk_norm.op("q_norm", tokens * self.heads, head),
                    self.qk_norm.op("k_norm", tokens * self.key_heads(), head)]  # fmt: skip
        ops.append(Op(name="scores", kind="attention", flops=4 * batch * seq * seq * inner, activation=tokens * inner))
        return [*ops, linear_op("output", tokens, inner, width, bias=self.output_bias)]


class GroupedAttention(nn.Module):
    """q, k and v of one input; softmax(q·kᵀ/√D + mask)·v; output."""

    joined: ClassVar[tuple[str, ...]] = ("q", "k", "v")  # dense layers with one input

    def __init__(self, config: Grouped, width: int):
        super().__init__()
        self.head_dim = config.head_width(width)
        inner, keys = config.heads * self.head_dim, config.key_heads() * self.head_dim
        self.sizes = (inner, keys, keys)
        self.scale = config.score_scale
        self.q = Dense(width, inner, bias=config.qkv_bias)
        self.k = Dense(width, keys, bias=config.qkv_bias)
        self.v = Dense(width, keys, bias=config.qkv_bias)
        self.q_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.k_norm = config.qk_norm.build(self.head_dim) if config.qk_norm else None
        self.fused: nn.Module | None = None  # the three at once, where weights were packed for inference
        self.output = residual_linear(inner, width, bias=config.output_bias)

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        q_BHTD, k_BKSD, v_BKSD = self.placed(x_BTE, frame, position)
        if frame.cache is not None:
            k_BKSD, v_BKSD = frame.cache.update(layer, k_BKSD, v_BKSD)
        mixed_BHTD = attend(q_BHTD, k_BKSD, v_BKSD, frame.scores, self.scale)
        return self.output(mixed_BHTD.transpose(1, 2).flatten(-2))

    def placed(self, x_BTE: Tensor, frame: Frame, position: PositionMethod) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D) of the new tokens, with their positions in them."""
        if self.q_norm is None and trains_fused(x_BTE) and position.turns_packed:
            packed_BTP = joint(x_BTE, self.q, self.k, self.v)
            return position.turn_packed(packed_BTP, frame.tables, *(size // self.head_dim for size in self.sizes[:2]))
        parts = self.fused(x_BTE).split(self.sizes, -1) if self.fused else parallel(x_BTE, self.q, self.k, self.v)
        q_BTHD, k_BTKD, v_BTKD = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.q_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        turned = position.turn(q_BTHD.transpose(1, 2), k_BTKD.transpose(1, 2), frame.tables)
        return *turned, v_BTKD.transpose(1, 2)

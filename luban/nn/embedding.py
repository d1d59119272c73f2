"""Tables that are looked up, and what a model makes of token ids before its first layer.

B batch, T tokens, E model width, W embedding width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.nn.linear import Linear
from luban.nn.norm import Norm
from luban.nn.position.base import PositionMethod
from luban.nn.roles import Role


class Embedding(nn.Embedding):
    """A table of rows; its parameter's role is `embedding`."""

    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "embedding"}

    def reset_parameters(self) -> None:
        """Nothing on the meta device, where torch would import its compiler first."""
        if not self.weight.is_meta:
            super().reset_parameters()


class EmbeddingNoise(nn.Module):
    """Uniform noise within ±α/√(T·W) on embeddings (B, T, W), in training alone (NEFTune, Jain et al. 2024). T counts the tokens of
    a row, however many documents it holds."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, x_BTW: Tensor) -> Tensor:
        """(B, T, W) → (B, T, W)."""
        if not self.training:
            return x_BTW
        bound = self.alpha / math.sqrt(x_BTW.shape[-2] * x_BTW.shape[-1])
        return x_BTW + (2 * torch.rand_like(x_BTW) - 1) * bound


class GradientShrink(nn.Module):
    """The embeddings as they are; their gradient times α (GLM-130B, Zeng et al. 2023, section 3.2; there α = 0.1)."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def forward(self, x_BTW: Tensor) -> Tensor:
        """(B, T, W) → (B, T, W), bit for bit."""
        return x_BTW + (self.alpha - 1) * (x_BTW - x_BTW.detach())


def add_noise(model: nn.Module, alpha: float) -> None:
    """Put noise on the token embeddings of a model in training. Raises ConfigError for a recurrent one."""
    for part in _input_embeddings(model, "train.neftune"):
        part.noise = EmbeddingNoise(alpha)


def shrink_gradient(model: nn.Module, alpha: float) -> None:
    """Multiply the gradients that reach token embeddings from the layers by α; a tied head's stay as they are. Raises ConfigError
    for a recurrent model."""
    for part in _input_embeddings(model, "train.embedding_gradient"):
        part.shrink = GradientShrink(alpha)


def _input_embeddings(model: nn.Module, setting: str) -> list[InputEmbedding]:
    found = [part for part in model.modules() if isinstance(part, InputEmbedding)]
    if not found:
        raise ConfigError(f"{setting} needs a Transformer: a recurrent model's embeddings are used as they are")
    return found


class InputEmbedding(nn.Module):
    """Token embeddings, positions and segments added, normalised, widened to the model's width.

    Args:
        tokens: the token table (V, W); encoder and decoder of one model may share it.
        segments: rows of a table that tells segments apart (BERT: 2; 0: no table).
        norm: of the sum (BLOOM, BERT); none: left as it is.
        width: E; where it isn't W a linear layer widens the embeddings (ALBERT).
        widen: whether there is that layer.
    """

    def __init__(
        self,
        tokens: nn.Module,
        embedding_width: int,
        width: int,
        *,
        segments: int = 0,
        norm: Norm | None = None,
        widen: bool = False,
    ):
        super().__init__()
        self.tokens = tokens
        self.noise: EmbeddingNoise | None = None
        self.shrink: GradientShrink | None = None
        self.segments = Embedding(segments, embedding_width) if segments else None
        self.norm = None if norm is None else norm.build(embedding_width)
        self.widen = Linear(embedding_width, width, bias=True) if widen else None

    def forward(
        self, tokens_BT: Tensor, position: PositionMethod, positions_BT: Tensor, segments_BT: Tensor | None = None
    ) -> Tensor:
        """(B, T) token ids, or (B, T, W) embeddings in their place → (B, T, E). Raises DataError for segments without a table."""
        embedded_BTW = tokens_BT if tokens_BT.is_floating_point() else self.tokens(tokens_BT)
        if self.shrink is not None:
            embedded_BTW = self.shrink(embedded_BTW)
        if self.noise is not None:
            embedded_BTW = self.noise(embedded_BTW)
        x_BTW = position.embed(embedded_BTW, positions_BT)
        if self.segments is not None:
            x_BTW = x_BTW + self.segments(torch.zeros_like(tokens_BT[:1, :1]) if segments_BT is None else segments_BT)
        elif segments_BT is not None:
            raise DataError("this model has no table of segments: build it with model.body.segments = 2")
        if self.norm is not None:
            x_BTW = self.norm(x_BTW)
        return x_BTW if self.widen is None else self.widen(x_BTW)

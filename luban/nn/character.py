"""Words from their characters: convolutions, highway layers, a projection (Kim et al. 2016; ELMo, Peters et al. 2018).

B batch, T tokens, C characters a token, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.nn.embedding import Embedding
from luban.nn.init import InitialValues
from luban.nn.linear import Linear
from luban.nn.roles import Role

FILTERS = (32, 32, 64, 128, 256, 512, 1024)  # ELMo's, of widths 1 … 7


@dataclass(frozen=True, kw_only=True)
class CharacterCNN:
    """A word's vector from (…, C) character ids; id 0 is padding. The defaults are ELMo's."""

    characters: int = 262  # character ids
    width: int = 16  # of a character's embedding
    filters: tuple[int, ...] = FILTERS  # how many of each width, from 1
    highways: int = 2  # highway layers

    def __post_init__(self):
        if self.characters < 2 or self.width < 1 or not self.filters or min(self.filters) < 0 or self.highways < 0:
            raise ConfigError("a character CNN needs at least 2 characters, a width, and filters of at least one width")

    def describe(self, graph: GraphBuilder, characters_BTC: GraphTensor, width: int) -> GraphTensor:
        """Record convolutions, highways and the projection, (B, T, C) → (B, T, E)."""
        batch, seq, length = characters_BTC.shape
        tokens, total = batch * seq, sum(self.filters)
        table = self.characters * self.width
        letters_NCW = graph.add(
            "characters",
            "embedding",
            characters_BTC,
            shape=(tokens, length, self.width),
            role="embedding",
            parameters=table,
        )
        found = []
        for i, count in enumerate(self.filters):
            weights = count * self.width * (i + 1)
            found.append(
                graph.add(
                    f"filters.{i}",
                    "linear",
                    letters_NCW,
                    shape=(tokens, count),
                    role="dense",
                    flops=2 * tokens * weights * max(length - i, 1),
                    parameters=weights + count,
                    saved_elements=tokens * count,
                )
            )
        x_NF = graph.add("joined", "concat", *found, shape=(tokens, total))
        for i in range(self.highways):
            x_NF = graph.add(
                f"highways.{i}",
                "linear",
                x_NF,
                shape=x_NF.shape,
                role="dense",
                flops=2 * tokens * total * 2 * total,
                parameters=(total + 1) * 2 * total,
                saved_elements=tokens * 2 * total,
                in_features=total,
                out_features=2 * total,
            )
        return graph.linear("projection", x_NF, width, bias=True).view(batch, seq, width)


class CharacterWords(nn.Module):
    """max over places of each filter, ReLU, highways, projection."""

    def __init__(self, config: CharacterCNN, width: int):
        super().__init__()
        total = sum(config.filters)
        self.characters = Embedding(config.characters, config.width)
        self.filters = nn.ModuleList(Filters(config.width, n, i + 1) for i, n in enumerate(config.filters))
        self.highways = nn.ModuleList(Highway(total) for _ in range(config.highways))
        self.projection = Linear(total, width)

    def forward(self, characters_BTC: Tensor) -> Tensor:
        """(B, T, C) int64 → (B, T, E)."""
        x_NWC = self.characters(characters_BTC.flatten(0, 1)).transpose(1, 2)
        word_NF = torch.relu(torch.cat([one(x_NWC) for one in self.filters], dim=-1))
        for highway in self.highways:
            word_NF = highway(word_NF)
        return self.projection(word_NF).unflatten(0, characters_BTC.shape[:2])


class Filters(nn.Conv1d):
    """The filters of one width, and the largest answer of each along the word."""

    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "dense", "bias": "bias"}

    def __init__(self, inputs: int, count: int, width: int):
        super().__init__(inputs, count, width)

    def draw_parameters(self, draw: InitialValues) -> None:
        """Standard deviation 1/√inputs, biases 0."""
        assert self.bias is not None
        fan_in = self.weight[0].numel()
        self.weight.copy_(draw.normal("weight", self.weight, fan_in**-0.5))
        self.bias.zero_()

    def forward(self, x_NWC: Tensor) -> Tensor:
        """(N, W, C) → (N, filters). A word shorter than the filter is padded to it."""
        short = self.kernel_size[0] - x_NWC.shape[-1]
        return super().forward(F.pad(x_NWC, (0, max(short, 0)))).amax(dim=-1)


class Highway(Linear):
    """g · x + (1 − g) · relu(W x + b), with the gate g = σ(V x + c) (Srivastava et al. 2015)."""

    def __init__(self, width: int):
        super().__init__(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → (…, width)."""
        changed, carry = super().forward(x).chunk(2, dim=-1)
        gate = torch.sigmoid(carry)
        return gate * x + (1 - gate) * torch.relu(changed)

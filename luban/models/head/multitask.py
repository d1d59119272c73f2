"""Several heads over one body, by name: what a model trained on several tasks ends in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from luban.core.errors import ConfigError, nearest
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class NamedHead:
    """One of the heads."""

    name: str  # by which tasks name it
    head: Head  # what it is

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ConfigError(f"a head's name is letters, digits and underscores, {self.name!r} given")


@dataclass(frozen=True, kw_only=True)
class MultitaskHead(Head):
    """The first head is the model's own: what its forward gives out, and what generation and evaluation read."""

    heads: tuple[NamedHead, ...] = ()  # at least one

    def __post_init__(self):
        names = [each.name for each in self.heads]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"a multitask head needs one or more heads of different names, {names} given")

    @property
    def main(self) -> Head:
        """The first."""
        return self.heads[0].head

    @property
    def pools(self) -> bool:  # type: ignore[override]
        """Whether the first head reads whole rows."""
        return self.main.pools

    def named(self, name: str) -> Head:
        """The head of this name. Raises ConfigError where there is none."""
        found = {each.name: each.head for each in self.heads}
        if name not in found:
            raise ConfigError(f"the model has no head '{name}'{nearest(name, found)}")
        return found[name]

    def check(self, spec: ModelSpec) -> None:
        """Every head fits the model."""
        for each in self.heads:
            each.head.check(spec)

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        return Heads({each.name: each.head.build(spec, tokens) for each in self.heads})

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """All heads, each over all rows: an upper bound, since a row is read by one of them."""
        for each in self.heads:
            each.head.describe(graph.scope(f"heads.{each.name}"), spec, hidden)


class Heads(nn.Module):
    """Heads by name; called, the first of them."""

    def __init__(self, heads: dict[str, nn.Module]):
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.main = next(iter(heads))

    def forward(self, hidden: Tensor, *args: Any, **options: Any) -> Any:
        """The first head's output for hidden states (B, T, E)."""
        return self.heads[self.main](hidden, *args, **options)

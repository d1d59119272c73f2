"""The family of objectives: how documents become batches, and what is summed over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from luban.core.registry import Registry, Variant
from luban.data.packing import Packing
from luban.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class Objective(Variant):
    """A family of training objectives."""

    registry: ClassVar[Registry] = Registry(
        "objective",
        {
            "causal": "luban.objectives.causal:Causal",
            "masked": "luban.objectives.masked:Masked",
            "prefix": "luban.objectives.prefix:PrefixLM",
            "blank_infilling": "luban.objectives.blank:BlankInfilling",
            "denoising": "luban.objectives.denoising:Denoising",
            "span_corruption": "luban.objectives.span:SpanCorruption",
            "bidirectional": "luban.objectives.bidirectional:Bidirectional",
            "auxiliary": "luban.objectives.auxiliary:Auxiliary",
            "labelled": "luban.objectives.labelled:Labelled",
        },
    )
    bodies: ClassVar[tuple[str, ...]]  # registered names of the bodies that it can train
    heads: ClassVar[tuple[str, ...]]  # … and of the heads
    reads_whole_text: ClassVar[bool] = (
        False  # every token is predicted once from those before: bits per byte mean something
    )

    def extra_ids(self) -> int:
        """Ids that it needs beyond the tokenizer's."""
        return 0

    def decoder_start(self, shards: Shards) -> int | None:
        """Id of the token that an encoder–decoder's answers begin with; none: it has no such model."""
        return None

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """Raise ConfigError where a model whose body and head are of the right kind lacks what this objective needs.

        Args:
            head: the head's settings.
            causal: whether the body sees earlier tokens only.
            tied: whether the embedding table is the output layer too.
        """

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """The rows that this objective makes of a split.

        Args:
            seq_len: longest row in tokens, T.
            seed: of everything that is drawn.
            packing: how documents are laid into rows, for the objectives that leave it open.

        Raises:
            DataError: the split or its vocabulary hasn't what the objective needs.
        """
        raise NotImplementedError

    def measured(self) -> Objective:
        """What held-out text is measured by: itself, without what training adds to its loss."""
        return self

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of losses in nats, number of trained targets) of a batch's `arrays()`."""
        raise NotImplementedError

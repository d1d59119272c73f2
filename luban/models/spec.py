"""A model as data: frozen, serialisable, checked when it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from luban.core.artifact import write_json
from luban.core.config import from_dict, to_dict
from luban.core.errors import ArtifactError, ConfigError
from luban.models.block.family import Block
from luban.models.block.pre import PreNorm
from luban.models.body import Body
from luban.models.decoder import DecoderBody
from luban.models.head import Head, LanguageModel
from luban.nn.attention.family import Attention
from luban.nn.attention.grouped import Grouped
from luban.nn.feedforward import FeedForward, SwiGLU
from luban.nn.init import Initialisation, NormalInit
from luban.nn.norm import Norm, RMSNorm
from luban.nn.position.family import Position, PositionShape
from luban.nn.position.rope import Rope

SPEC = "spec.json"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's shape. The defaults are LLaMA's parts at a size for a laptop."""

    vocab_size: int = 4096  # token ids, special tokens included
    width: int = 256  # E, of the residual stream
    layers: int = 6  # blocks
    context: int = 2048  # longest sequence in tokens
    position: Position = field(default_factory=Rope)  # where a token stands
    attention: Attention = field(default_factory=lambda: Grouped(heads=8, kv_heads=4))  # how tokens look at each other
    norm: Norm = field(default_factory=RMSNorm)  # of every block and the end
    embedding_norm: Norm | None = None  # of the embeddings, positions added (BLOOM, BERT); none: left as they are
    feedforward: FeedForward = field(default_factory=lambda: SwiGLU(width=768))  # the position-wise network
    block: Block = field(default_factory=PreNorm)  # how a layer is arranged
    body: Body = field(default_factory=DecoderBody)  # what stands between tokens and hidden states
    head: Head = field(default_factory=LanguageModel)  # what is read off the hidden states
    tied_head: bool = False  # whether the output layer is the embedding table
    init: Initialisation = field(default_factory=NormalInit)  # of a model trained from scratch

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model {name} must be at least 1, {getattr(self, name)} given")
        self.body.check(self)

    @property
    def position_shape(self) -> PositionShape:
        """What a position method needs to know of this model."""
        return PositionShape(width=self.width, heads=self.attention.heads,
                             head_dim=self.attention.head_width(self.width), context=self.context)  # fmt: skip

    @property
    def parameters(self) -> int:
        """Scalars in the model, by arithmetic."""
        from luban.models.describe import describe

        return describe(self, batch=1, seq=1).parameters


def write_spec(spec: ModelSpec, folder: Path) -> None:
    """Write `spec.json` into `folder`."""
    write_json(folder / SPEC, to_dict(spec))


def read_spec(folder: Path) -> ModelSpec:
    """The specification in `folder`. Raises ArtifactError where there is none or it can't be read."""
    try:
        return from_dict(ModelSpec, json.loads((folder / SPEC).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {SPEC}: it is not a model of Luban's") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / SPEC} is not JSON: {error}") from None

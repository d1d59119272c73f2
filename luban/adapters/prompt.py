"""Prompt tuning: trained embeddings before every text (Lester et al. 2021, section 2).

A decoder's prompt sees itself alone, so what later tokens attend to of it are the keys and values of one forward over the
prompt. Every document of a packed row has the prompt before it, and the row becomes no longer.

P prompt tokens, E model width, W embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig
from luban.adapters.prefix import require_prompts, require_unbiased
from luban.core.errors import ConfigError
from luban.core.protocols import KeysValues
from luban.core.seeding import derive
from luban.models.base import Model
from luban.models.decoder import Decoder, Prompts
from luban.models.spec import ModelSpec
from luban.models.stack import forward_context
from luban.nn.attention.backend import AttentionBackend
from luban.nn.init import InitialValues
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class PromptTuning(AdapterConfig):
    """Embeddings of a prompt. High learning rates suit it (the paper: 0.3 with Adafactor)."""

    peft = "PROMPT_TUNING"
    pages = False
    length: int = 20  # P, prompt tokens
    # random: normal like the embedding; vocabulary: rows of the embedding drawn at random; labels: those of `tokens`
    init: Literal["random", "vocabulary", "labels"] = "vocabulary"
    tokens: tuple[int, ...] = ()  # ids that init = "labels" begins with, repeated up to `length`
    seed: int = 0  # that rows of the vocabulary are drawn from

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError(f"adapter.length must be at least 1, {self.length} given")
        if (self.init == "labels") != bool(self.tokens):
            raise ConfigError('adapter.tokens and adapter.init = "labels" go together')

    def check(self, spec: ModelSpec) -> None:
        """Raise for a model that can't have a prompt, and for ids outside of its vocabulary."""
        require_prompts(spec, "a prompt")
        if any(not 0 <= token < spec.vocab_size for token in self.tokens):
            raise ConfigError(f"adapter.tokens must be below the vocabulary's size, {spec.vocab_size}")

    def insert(self, model: Model) -> None:
        """Put the prompt before the decoder's texts."""
        require_unbiased(model, "a prompt")
        assert isinstance(model, Decoder)
        model.add_prompts(Prompt(model.spec.body.embedding_width(model.spec), self))


class Prompt(Adapter, Prompts):
    """Embeddings, P·W parameters."""

    runs_layers = True
    parameter_roles: ClassVar[dict[str, Role]] = {"embedding": "adapter"}

    def __init__(self, width: int, config: PromptTuning):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.length, width))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Normal with deviation 0.5; `values_from` sets others."""
        self.embedding.copy_(draw.normal("embedding", self.embedding, 0.5))

    def values_from(self, weights: Mapping[str, Tensor], place: str) -> None:
        """Rows of the token embedding."""
        if self.config.init == "random":
            return
        rows, length = weights["decoder.embedding.tokens.weight"], self.config.length
        generator = torch.Generator().manual_seed(derive(self.config.seed, "prompt"))
        ids = torch.randint(rows.shape[0], (length,), generator=generator)
        if self.config.tokens:
            ids = torch.tensor([self.config.tokens[i % len(self.config.tokens)] for i in range(length)])
        self.embedding.copy_(rows[ids])

    def forward(self, decoder: Decoder) -> Mapping[int, KeysValues]:
        """Layer → keys and values (1, K, P, D) of the prompt, read alone at the first positions."""
        recording, embedded_1PW = Recording(), self.embedding[None]
        decoder.decoder(embedded_1PW, forward_context(decoder.decoder, embedded_1PW, None, None, recording))
        return {layer: slot.kept for layer, slot in recording.slots.items()}


class Slot:
    """Keys and values of a layer."""

    kept: KeysValues


class Recording(AttentionBackend):
    """Attention that keeps the keys and values of every layer."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.slots: dict[int, Slot] = {}

    def layer(self, index: int) -> Any:
        """Where `attend` puts them; no number, so that compiled layers share a graph."""
        return self.slots.setdefault(index, Slot())

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """Attention, (B, H, T, D)."""
        cache.kept = (k_BKTD, v_BKTD)
        return super().attend(q_BHTD, k_BKTD, v_BKTD, mask, None, scale)

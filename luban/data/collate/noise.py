"""BART's five ways to corrupt a text (Lewis et al. 2020, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.data.collate.rows import round_randomly
from luban.data.collate.special_tokens import MASK, SpecialTokens


@dataclass(frozen=True, kw_only=True)
class Noise(Variant):
    """Base config of noise on input tokens; `then` is applied after it, to its output."""

    registry: ClassVar[Registry] = Registry(
        "noise",
        {
            "token_masking": "luban.data.collate.noise:TokenMasking",
            "token_deletion": "luban.data.collate.noise:TokenDeletion",
            "text_infilling": "luban.data.collate.noise:TextInfilling",
            "sentence_permutation": "luban.data.collate.noise:SentencePermutation",
            "document_rotation": "luban.data.collate.noise:DocumentRotation",
        },
    )
    then: Noise | None = None  # another noise after this one

    def __call__(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """The corrupted text, this noise and those after it."""
        corrupted = self.corrupt(rng, text, special)
        return corrupted if self.then is None else self.then(rng, corrupted, special)

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """The text with this noise alone."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Share(Noise):
    """A noise that meets a share of the tokens."""

    rate: float = 0.3  # share of the tokens

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ConfigError(f"noise rate must be between 0 and 1, {self.rate} given")

    def places(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """(size,) bool: which tokens are met."""
        met = np.zeros(size, dtype=bool)
        met[rng.permutation(size)[: round_randomly(rng, self.rate * size)]] = True
        return met


@dataclass(frozen=True, kw_only=True)
class TokenMasking(Share):
    """Tokens become the mask token, one for one."""

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """Same length."""
        return np.where(self.places(rng, len(text)), special.need(MASK, "mask"), text)


@dataclass(frozen=True, kw_only=True)
class TokenDeletion(Share):
    """Tokens disappear: the model has to find out where."""

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """Shorter."""
        return text[~self.places(rng, len(text))]


@dataclass(frozen=True, kw_only=True)
class TextInfilling(Share):
    """Spans of Poisson lengths become one mask token each; a span of length 0 inserts one."""

    mean_span: float = 3.0  # of the lengths, in tokens

    def __post_init__(self):
        super().__post_init__()
        if self.mean_span <= 0:
            raise ConfigError(
                f"noise mean_span must be positive, {self.mean_span} given: spans of no length never fill a share"
            )

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """Spans don't touch, and together they hold the share of the tokens."""
        budget, lengths = round_randomly(rng, self.rate * len(text)), []
        while sum(lengths) < budget:
            lengths.append(min(int(rng.poisson(self.mean_span)), budget - sum(lengths)))
        lengths = [int(n) for n in rng.permutation(lengths)]
        mask, kept = special.need(MASK, "mask"), len(text) - sum(lengths)
        cuts = (
            np.sort(rng.integers(0, kept + 1, len(lengths)))
            if kept < len(lengths)
            else np.sort(rng.choice(kept + 1, len(lengths), replace=False))
        )
        out: list[int] = []
        at = done = 0
        for cut, length in zip(cuts.tolist(), lengths, strict=True):  # `cut` kept tokens stand before this span
            out += [*text[at : at + cut - done].tolist(), mask]
            at, done = at + cut - done + length, cut
        return np.array([*out, *text[at:].tolist()], dtype=text.dtype)


@dataclass(frozen=True, kw_only=True)
class SentencePermutation(Noise):
    """Sentences change places."""

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """Cut behind every token that ends a sentence."""
        sentences = np.split(text, np.flatnonzero(special.ends_sentence[text][:-1]) + 1)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


@dataclass(frozen=True, kw_only=True)
class DocumentRotation(Noise):
    """The text begins at a random token and goes around: the model has to find the beginning."""

    def corrupt(self, rng: np.random.Generator, text: np.ndarray, special: SpecialTokens) -> np.ndarray:
        """Same length."""
        return np.roll(text, -int(rng.integers(max(len(text), 1))))  # another noise may have left nothing

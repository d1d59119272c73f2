"""Which places of a text are predicted: single tokens, whole words, n-grams."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Selection(Variant):
    """Base config of the selection of tokens to predict."""

    registry: ClassVar[Registry] = Registry(
        "selection",
        {
            "tokens": "luban.data.collate.selection:Tokens",
            "words": "luban.data.collate.selection:Words",
            "ngrams": "luban.data.collate.selection:NGrams",
        },
    )

    def choose(self, rng: np.random.Generator, open_T: np.ndarray, starts_T: np.ndarray, budget: int) -> np.ndarray:
        """(T,) bool with about `budget` places of `open_T` chosen, never more.

        Args:
            open_T: (T,) bool, places that may be chosen.
            starts_T: (T,) bool, where a word begins.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Tokens(Selection):
    """Each place by itself (Devlin et al. 2019, section 3.1)."""

    def choose(self, rng: np.random.Generator, open_T: np.ndarray, starts_T: np.ndarray, budget: int) -> np.ndarray:
        """A random subset of exactly this size."""
        chosen = np.zeros(len(open_T), dtype=bool)
        chosen[rng.permutation(np.flatnonzero(open_T))[:budget]] = True
        return chosen


@dataclass(frozen=True, kw_only=True)
class Words(Selection):
    """All tokens of a word or none (whole-word masking, released with BERT in May 2019)."""

    def choose(self, rng: np.random.Generator, open_T: np.ndarray, starts_T: np.ndarray, budget: int) -> np.ndarray:
        """Words in random order; one that would go over the budget is passed by."""
        words = words_of(open_T, starts_T)
        return _fill(len(open_T), [words[i] for i in rng.permutation(len(words))], budget)


@dataclass(frozen=True, kw_only=True)
class NGrams(Selection):
    """Runs of n words with p(n) ∝ 1/n (Lan et al. 2020, section 3.1)."""

    longest: int = 3  # n at most

    def __post_init__(self):
        if self.longest < 1:
            raise ConfigError(f"the longest n-gram must be at least 1 word, {self.longest} given")

    def probabilities(self) -> np.ndarray:
        """(longest,): p(n) for n = 1 …"""
        weights = 1 / np.arange(1, self.longest + 1)
        return weights / weights.sum()

    def choose(self, rng: np.random.Generator, open_T: np.ndarray, starts_T: np.ndarray, budget: int) -> np.ndarray:
        """Runs at random places, none over another; one that would go over the budget is passed by."""
        words = words_of(open_T, starts_T)
        sizes = rng.choice(np.arange(1, self.longest + 1), size=len(words), p=self.probabilities())
        runs = []
        for first, n in zip(rng.permutation(len(words)), sizes, strict=True):
            run = words[first : first + n]
            whole = len(run) == n and all(a[-1] + 1 == b[0] for a, b in itertools.pairwise(run))
            if whole:
                runs.append(np.concatenate(run))
        return _fill(len(open_T), runs, budget)


def words_of(open_T: np.ndarray, starts_T: np.ndarray) -> list[np.ndarray]:
    """The places of each word, in order; what isn't open belongs to none and ends one."""
    cuts = starts_T | ~open_T
    cuts[1:] |= ~open_T[:-1]
    places = np.flatnonzero(open_T)
    if not len(places):
        return []
    first = np.flatnonzero(cuts[places])
    return np.split(places, first[first > 0])


def _fill(size: int, groups: list[np.ndarray], budget: int) -> np.ndarray:
    chosen = np.zeros(size, dtype=bool)
    for group in groups:
        if budget <= 0:
            break
        if len(group) <= budget and not chosen[group].any():
            chosen[group] = True
            budget -= len(group)
    return chosen

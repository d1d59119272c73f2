"""Beam search on the host: which hypotheses are continued, which answers are kept.

Pure Python over ints and floats. An answer scores the sum of its tokens' log-probabilities over length ** length_penalty
(Wu et al. 2016, section 7, without the constant), its end token counted, as in transformers. The search ends when no
hypothesis can still lead to an answer better than the worst of the `beams` kept: transformers' early_stopping="never".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Candidates = Sequence[
    tuple[int, float]
]  # tokens that may follow a hypothesis with their log-probabilities, likeliest first


@dataclass(frozen=True)
class Hypothesis:
    """An answer, or the first tokens of one."""

    tokens: tuple[int, ...]
    logprob: float  # sum over the tokens
    finish_reason: Literal["stop", "length"] | None = None  # none: it isn't finished


@dataclass(frozen=True)
class Answers:
    """What a search ends with: (hypothesis, score) each, the best first."""

    best: tuple[tuple[Hypothesis, float], ...]


class BeamSearch:
    """One search.

    Args:
        beams: hypotheses continued at each step, and answers kept.
        length_penalty: 0: sums of log-probabilities are compared; larger: longer answers win more often.
        ends: tokens that end an answer.
        max_tokens: of an answer.
    """

    def __init__(self, beams: int, *, length_penalty: float, ends: Sequence[int], max_tokens: int):
        self.beams, self.length_penalty, self.ends = beams, length_penalty, frozenset(ends)
        self.max_tokens = max_tokens
        self.live = [Hypothesis((), 0.0)]
        self.answers: list[tuple[Hypothesis, float]] = []  # the best first

    @property
    def wanted(self) -> int:
        """Candidates of each hypothesis that are needed: so many that `beams` of all don't end an answer."""
        return (1 + max(1, len(self.ends))) * self.beams

    def score(self, hypothesis: Hypothesis) -> float:
        """What answers are compared by."""
        return hypothesis.logprob / len(hypothesis.tokens) ** self.length_penalty

    def advance(self, candidates: Sequence[Candidates]) -> list[tuple[int, int]]:
        """Go on by a token.

        Args:
            candidates: of each of `live`, in its order; −∞ is no candidate.

        Returns:
            (index of the hypothesis, token) of every new one of `live`; none: the search has ended.
        """
        found = [
            (hypothesis.logprob + logprob, index, token)
            for index, (hypothesis, following) in enumerate(zip(self.live, candidates, strict=True))
            for token, logprob in following
            if logprob > float("-inf")
        ]
        found.sort(key=lambda each: -each[0])  # stable: equal ones stay in the order of hypotheses and tokens
        kept: list[tuple[int, int]] = []
        live: list[Hypothesis] = []
        for rank, (logprob, index, token) in enumerate(found[: self.wanted]):
            tokens = (*self.live[index].tokens, token)
            if token in self.ends or len(tokens) == self.max_tokens:
                if rank < self.beams:
                    self._keep(Hypothesis(tokens, logprob, "stop" if token in self.ends else "length"))
            elif len(kept) < self.beams:
                kept.append((index, token))
                live.append(Hypothesis(tokens, logprob))
        self.live = live
        return kept if self._promising() else []

    def _keep(self, hypothesis: Hypothesis) -> None:
        """Take up an answer, if it is among the best."""
        self.answers.append((hypothesis, self.score(hypothesis)))
        self.answers.sort(key=lambda pair: -pair[1])
        del self.answers[self.beams :]

    def _promising(self) -> bool:
        """Whether a hypothesis can still lead to an answer better than the worst that is kept. Sums only fall, so that the best
        length is the longest where the penalty rewards length, else the next."""
        if not self.live or len(self.answers) < self.beams:
            return bool(self.live)
        length = self.max_tokens if self.length_penalty > 0 else len(self.live[0].tokens) + 1
        return max(h.logprob for h in self.live) / length**self.length_penalty > self.answers[-1][1]

    def result(self) -> Answers:
        """The answers, once the search has ended."""
        return Answers(tuple(self.answers))

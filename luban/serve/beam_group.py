"""The sequences of one beam search among those that run: which are continued, forked and dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luban.generate.beam import Answers, BeamSearch, Candidates
from luban.generate.session import Sequence as Growing
from luban.serve.scheduler import Scheduler, SequenceState


def search_for(growing: Growing, max_new_tokens: int) -> BeamSearch:
    """The search of a request.

    Args:
        max_new_tokens: tokens that the context leaves for an answer.
    """
    sampling = growing.sampling
    return BeamSearch(
        sampling.beams,
        length_penalty=sampling.length_penalty,
        ends=growing.ends,
        max_tokens=min(sampling.max_tokens, max_new_tokens),
    )


def grown(parents: Sequence[Growing], moves: Sequence[tuple[int, int]]) -> list[Growing]:
    """The hypotheses that continue `parents`, (index of the parent, token) each. A parent's first child takes its matcher
    over, others get copies."""
    taken: set[int] = set()
    children: list[Growing] = []
    for choice, (index, token) in enumerate(moves):
        parent, matcher = parents[index], parents[index].matcher
        if matcher is not None and index in taken:
            matcher = matcher.copy()
        taken.add(index)
        children.append(replace(parent, tokens=[*parent.tokens, token], choice=choice, matcher=matcher))
    for child in children:  # once all copies are made
        if child.matcher is not None:
            child.matcher.consume(child.tokens[-1])
    return children


class BeamGroup:
    """The hypotheses of one search over a paged cache. They hold their common blocks together (`Scheduler.fork`).

    Args:
        growing: stands for the whole search.
        state: of its prompt.
        max_new_tokens: tokens that the context leaves.
    """

    def __init__(self, growing: Growing, state: SequenceState, max_new_tokens: int):
        self.growing, self.search = growing, search_for(growing, max_new_tokens)
        self.states, self.sequences = [state], [replace(growing)]
        self.candidates: dict[SequenceState, Candidates] = {}
        state.spare = growing.sampling.beams - 1
        self._next = 1  # number of the next hypothesis

    def sequence(self, state: SequenceState) -> Growing:
        """The hypothesis that a state belongs to."""
        return self.sequences[self.states.index(state)]

    @property
    def complete(self) -> bool:
        """Whether the candidates of all hypotheses are known."""
        return len(self.candidates) == len(self.states)

    def expand(self, scheduler: Scheduler) -> Answers | None:
        """Go on by a token, once `complete`; returns the answers where the search has ended."""
        moves = self.search.advance([self.candidates[state] for state in self.states])
        self.candidates.clear()
        if not moves:
            return self.search.result()
        states: list[SequenceState] = []
        taken: set[int] = set()
        for index, _ in moves:
            parent = self.states[index]
            if index in taken:
                states.append(scheduler.fork(parent, (*parent.arrival[:-1], self._next)))
                self._next += 1
            else:
                states.append(parent)
            taken.add(index)
        for index, state in enumerate(self.states):
            state.spare = 0
            if index not in taken:
                scheduler.remove(state)
        for state, (_, token) in zip(states, moves, strict=True):
            state.tokens.append(token)
        self.states, self.sequences = states, grown(self.sequences, moves)
        return None

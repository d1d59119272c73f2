"""Sequences continued by a mixture of the next-token distributions behind several prompts, as RAG-Token's passages.

H sequences, K prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from luban.generate.session import Sequence, Session


class Mixture:
    """Every sequence has a row of the session for each prompt; all of them read the same new tokens.

    Args:
        session: without sequences.
        first: the sequence to begin with; its prompt counts for nothing.
        prompts: K lists of token ids.
        weights_K: log-probabilities of the prompts.
    """

    def __init__(self, session: Session, first: Sequence, prompts: SequenceOf[list[int]], weights_K: Tensor):
        self.session, self.prompts, self.sequences = session, list(prompts), [first]
        session.add(self._rows(first))
        self.weights_K = weights_K.to(self._each_HKV)

    def _rows(self, sequence: Sequence) -> list[Sequence]:
        return [replace(sequence, prompt=prompt, tokens=list(sequence.tokens)) for prompt in self.prompts]

    @property
    def _each_HKV(self) -> Tensor:
        logits = self.session.logits
        assert logits is not None
        return logits.unflatten(0, (-1, len(self.prompts)))

    @property
    def logits(self) -> Tensor:
        """(H, V) float32 log-probabilities of the next token, the prompts summed out."""
        return (self._each_HKV.log_softmax(-1) + self.weights_K[:, None]).logsumexp(1)

    def seen(self, sequence: Sequence) -> list[int]:
        """The tokens that a penalty on repetition counts: those of the answer."""
        return sequence.tokens

    @torch.inference_mode()
    def go_on(self, parents: SequenceOf[int], sequences: SequenceOf[Sequence]) -> None:
        """Go on with sequences that are those at `parents` and one more token each, which is read."""
        width = len(self.prompts)
        rows = [parent * width + column for parent in parents for column in range(width)]
        self.sequences = list(sequences)
        grown = [row for sequence in sequences for row in self._rows(sequence)]
        self.session.replace(rows, grown)
        self.session.advance(grown)

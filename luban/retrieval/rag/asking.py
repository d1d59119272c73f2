"""Questions answered by a generator that was trained with its passages summed out."""

from __future__ import annotations

import torch

from luban.retrieval.answering import NOTHING, Answer, Citation
from luban.retrieval.index import Index
from luban.retrieval.rag.decoding import Decoding, decode
from luban.retrieval.rag.model import RagModel


class RagAsker:
    """Answers questions, as `luban.retrieval.asking.Asker`.

    Args:
        k: passages a question; None: as many as in training.
        decoding: of RAG-Sequence.
        beams: of each beam search.

    Raises:
        LineageError: the index was built by another encoder of passages than the one of training.
    """

    def __init__(
        self,
        index: Index,
        rag: RagModel,
        k: int | None = None,
        *,
        decoding: Decoding = "thorough",
        beams: int = 4,
        max_tokens: int = 64,
    ):
        rag.require(index)
        self.index, self.rag, self.k = index, rag, k or rag.k
        self.decoding: Decoding = decoding
        self.beams, self.max_tokens = beams, max_tokens

    @torch.no_grad()
    def ask(self, question: str) -> Answer:
        """The likeliest answer; it cites the passage with the largest posterior probability of having led to it."""
        generator = self.rag.generator
        (found,) = self.rag.find(self.index, [question], self.k)
        if not found.hits:
            return Answer(text=NOTHING, citations=(), written=NOTHING)
        prompts = [generator.prompt(question, hit.passage.titled, self.max_tokens) for hit in found.hits]
        best = decode(
            generator,
            self.rag.marginal,
            prompts,
            found.priors_K,
            decoding=self.decoding,
            beams=self.beams,
            max_tokens=self.max_tokens,
        )[0]
        written, posterior = generator.text(best.tokens), best.responsibilities_K
        place = posterior.index(max(posterior))
        return Answer(text=written, citations=(Citation(mark=place + 1, hit=found.hits[place]),), written=written)

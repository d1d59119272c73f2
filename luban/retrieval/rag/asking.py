"""Questions answered by a generator that was trained with its passages summed out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from luban.retrieval.answering import NOTHING, Answer, Citation
from luban.retrieval.index import Index
from luban.retrieval.rag.decoding import Decoding, decode
from luban.retrieval.rag.model import RagModel


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer with its tokens. See `luban.core.protocols.Answered`."""

    said: Answer
    token_ids: list[int]
    prompt_token_ids: list[int]  # of the question behind each passage, one after another
    ended: bool

    @property
    def text(self) -> str:
        """Its words."""
        return self.said.text

    def citations(self, answer: str) -> list[dict[str, Any]]:
        """The passage that it most likely comes from, whatever its words."""
        return [citation.row() for citation in self.said.citations]


class RagAsker:
    """Answers questions, as `luban.retrieval.asking.Asker`, and for a server (`luban.core.protocols.Answerer`).

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
        self.index, self.rag, self.k = index, rag, rag.k if k is None else k
        self.decoding: Decoding = decoding
        self.beams, self.max_tokens = beams, max_tokens

    def ask(self, question: str) -> Answer:
        """The likeliest answer; it cites the passage with the largest posterior probability of having led to it."""
        return self.answer(question).said

    @torch.no_grad()
    def answer(self, question: str, max_tokens: int | None = None) -> Answered:
        """The likeliest answer with its tokens.

        Args:
            max_tokens: in the place of the asker's own.

        Raises DataError for an empty question, and for one that the generator's context can't hold.
        """
        generator, longest = self.rag.generator, max_tokens or self.max_tokens
        (found,) = self.rag.find(self.index, [question], self.k)
        if not found.hits:
            nothing = Answer(text=NOTHING, citations=(), written=NOTHING)
            return Answered(said=nothing, token_ids=[], prompt_token_ids=[], ended=True)
        prompts = [generator.prompt(question, hit.passage.titled, longest) for hit in found.hits]
        best = decode(
            generator,
            self.rag.marginal,
            prompts,
            found.priors_K,
            decoding=self.decoding,
            beams=self.beams,
            max_tokens=longest,
        )[0]
        written, posterior = generator.text(best.tokens), best.responsibilities_K
        place = posterior.index(max(posterior))
        cited = (Citation(mark=place + 1, hit=found.hits[place]),)
        return Answered(
            said=Answer(text=written, citations=cited, written=written),
            token_ids=list(best.tokens),
            prompt_token_ids=[token for prompt in prompts for token in prompt],
            ended=best.tokens[-1] in generator.model.stop_ids,
        )

"""A model asked about an index's passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from luban.core.log import progress
from luban.core.metrics.answers import contains_answer, exact_match, f1
from luban.core.metrics.bootstrap import interval
from luban.generate.sampling import Sampling
from luban.generate.structure import Structure
from luban.load.model import LoadedModel
from luban.retrieval.answering import DEFAULT_K, NOTHING, Answer, PassageRetriever, says_nothing, without_marks
from luban.retrieval.index import Searches
from luban.retrieval.questions import Question
from luban.serve.engine import Engine
from luban.tokenizer.chat import render

ANSWER_TOKENS = 64  # of an answer at most; as many are left free in the context


class Asks(Protocol):
    """What answers questions from an index."""

    def ask(self, question: str) -> Answer:
        """The answer with its citations."""
        ...


class Asker:
    """Answers questions with a model and an index.

    Args:
        model: one that writes text, with a tokenizer.
        k: passages it is given at most; None: 5.
        sentences: of these passages that it is given at most; None: whole passages.
        quote: hold answers to consecutive words of what the model reads.
    """

    def __init__(
        self,
        index: Searches,
        model: LoadedModel,
        k: int | None = None,
        max_tokens: int = ANSWER_TOKENS,
        *,
        sentences: int | None = None,
        quote: bool = False,
    ):
        self.retriever = PassageRetriever(index, DEFAULT_K if k is None else k, sentences, quote=quote)
        self.model, self.max_tokens = model, max_tokens
        self.engine = Engine(model)

    def _tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self.model.need_tokenizer()
        if tokenizer.chat_template is None:
            return self.engine.tokens_of(f"{messages[-1]['content']}\nAnswer:")
        return render(messages, tokenizer, add_generation_prompt=True).token_ids

    def ask(self, question: str) -> Answer:
        """The model's answer with its citations; that no passage supports one, where it cites none."""
        messages = [{"role": "user", "content": question}]
        longest = self.model.spec.context - self.max_tokens
        grounding = self.retriever.ground(messages, lambda m: len(self._tokens(m)) <= longest)
        if not grounding.hits:
            return Answer(text=NOTHING, citations=(), written=NOTHING)
        structure = None if grounding.grammar is None else Structure.grammar(grounding.grammar)
        least = 0 if structure is None else 1  # no words at all are a quotation to the grammar, too
        sampling = Sampling(max_tokens=self.max_tokens, min_tokens=least, temperature=0.0, structure=structure)
        (result,) = self.engine.generate([self._tokens(grounding.messages)], sampling)
        written = result.choices[0].text.strip()
        citations = grounding.cited(written)
        text = written if citations else NOTHING
        return Answer(text=text, citations=citations, written=written, read=grounding.hits)


def evaluate_answers(asker: Asks, questions: Sequence[Question]) -> dict[str, Any]:
    """Exact match and F1 of what the model wrote, marks left out, with 95% intervals; and of its answers with citations the
    share of which a cited passage holds a right answer (`attribution`), and the share without any (`unsupported`)."""
    matches, overlaps, attributed, unsupported = [], [], [], []
    with progress("asking", total=len(questions), unit="questions") as bar:
        for question in questions:
            answer = asker.ask(question.text)
            said = "" if says_nothing(answer.written) else without_marks(answer.written)
            references = question.answers or ("",)
            matches.append(exact_match(said, references))
            overlaps.append(f1(said, references))
            unsupported.append(float(not answer.citations))
            if answer.citations:
                held = any(contains_answer(c.hit.passage.text, question.answers) for c in answer.citations)
                attributed.append(float(held))
            bar.advance()
    return {
        "questions": len(questions),
        "exact_match": sum(matches) / len(matches),
        "exact_match_interval": interval(matches),
        "f1": sum(overlaps) / len(overlaps),
        "f1_interval": interval(overlaps),
        "attribution": sum(attributed) / len(attributed) if attributed else None,
        "unsupported": sum(unsupported) / len(unsupported),
    }

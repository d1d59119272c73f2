"""Answers from passages, with citations that resolve to passage and offsets.

One template renders passages and question for every model. A mark such as [2] in the answer cites the second passage; of an
answer without marks those passages are cited in which its words stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

import jinja2

from luban.core.errors import DataError, UsageError
from luban.core.metrics.answers import answer_tokens
from luban.retrieval.excerpts import excerpts
from luban.retrieval.index import Hit, Searches

NOTHING = "No passage supports this."
MARK = re.compile(r"[\[【](\d{1,3})[\]】]")
COVERED = 0.8  # share of an answer's words that must stand in a passage for it to be cited without a mark
DEFAULT_K = 5

Message = dict[str, Any]


@cache
def _template() -> jinja2.Template:
    text = resources.files("luban.retrieval").joinpath("answer.jinja").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=False, keep_trailing_newline=False).from_string(text)


def prompt(question: str, hits: Sequence[Hit], sentences: int | None = None) -> str:
    """The question with its passages, numbered from 1, as a user's message; of the passages no more than so many `sentences`
    together, those that fit the question best."""
    texts = _read(question, hits, sentences)
    shown = [(n, hit.passage.title, text) for n, (hit, text) in enumerate(zip(hits, texts, strict=True), 1) if text]
    return _template().render(passages=shown, question=question, nothing=NOTHING)


def _read(question: str, hits: Sequence[Hit], sentences: int | None) -> list[str]:
    """What the model reads of each passage."""
    texts = [hit.passage.text for hit in hits]
    return texts if sentences is None else excerpts(question, texts, sentences)


def quotations(texts: Sequence[str]) -> str:
    """A grammar (`Structure.grammar`) of the texts that are consecutive words of one of `texts`; of `NOTHING` where there are
    none, since without passages there is nothing to quote."""
    if not any(texts):
        return f"start: {json.dumps(NOTHING)}"
    rules = [f'q{n}: %regex {{ "substring_words": {json.dumps(text)} }}' for n, text in enumerate(texts) if text]
    return "\n".join([f"start: {' | '.join(rule.partition(':')[0] for rule in rules)}", *rules])


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A passage that an answer refers to."""

    mark: int  # its number in the prompt
    hit: Hit

    def row(self) -> dict[str, Any]:
        """As plain data: mark, score, title, text, source, start, stop, and licence where known."""
        return {"mark": self.mark, **self.hit.row()}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered, and from where."""

    text: str  # `NOTHING` where no passage supports what the model wrote
    citations: tuple[Citation, ...]
    written: str  # by the model, word for word
    read: tuple[Hit, ...] = ()  # the passages that it was given, best first

    def row(self) -> dict[str, Any]:
        """As plain data."""
        row: dict[str, Any] = {"answer": self.text, "citations": [citation.row() for citation in self.citations]}
        return row if self.text == self.written else {**row, "written": self.written}


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """A conversation whose last question has passages before it. See `luban.core.protocols.Grounded`."""

    messages: list[Message]
    hits: tuple[Hit, ...]  # the passages in it, in the order of their numbers
    quoted: tuple[str, ...] | None = (
        None  # what is read of each, its words one space apart, where answers must quote one
    )

    @property
    def grammar(self) -> str | None:
        """Of the answers that quote a passage, where they must."""
        return None if self.quoted is None else quotations(self.quoted)

    def cited(self, answer: str) -> tuple[Citation, ...]:
        """The passages that an answer cites, each once; numbers that no passage has are passed over. Of a quotation it is the best
        passage that it stands in: marks in it are the passage's own."""
        if self.quoted is not None:
            words = " ".join(answer.split())
            held = (n for n, text in enumerate(self.quoted) if words and words in text)
            return tuple(Citation(mark=n + 1, hit=self.hits[n]) for n in islice(held, 1))
        marks = dict.fromkeys(int(mark) for mark in MARK.findall(answer))
        found = [Citation(mark=mark, hit=self.hits[mark - 1]) for mark in marks if 1 <= mark <= len(self.hits)]
        if marks or says_nothing(answer):
            return tuple(found)
        words = set(answer_tokens(answer))
        shares = [_covered(words, hit) for hit in self.hits]
        best = max(shares, default=0.0)
        if best < COVERED:
            return ()
        mark = shares.index(best) + 1
        return (Citation(mark=mark, hit=self.hits[mark - 1]),)

    def citations(self, answer: str) -> list[dict[str, Any]]:
        """`cited` as plain data."""
        return [citation.row() for citation in self.cited(answer)]


def _covered(words: set[str], hit: Hit) -> float:
    held = set(answer_tokens(hit.passage.titled))
    return len(words & held) / len(words) if words else 0.0


def says_nothing(answer: str) -> bool:
    """Whether an answer says that no passage supports one."""
    return answer_tokens(NOTHING) == answer_tokens(answer)[: len(answer_tokens(NOTHING))]


def without_marks(answer: str) -> str:
    """The answer's words alone."""
    return " ".join(MARK.sub("", answer).split())


class PassageRetriever:
    """Puts an index's passages before the last question of a conversation: a `luban.core.protocols.Grounder`.

    Args:
        k: passages at most; fewer where they don't fit the model's context.
        sentences: of all passages together, at most; None: whole passages.
        quote: hold answers to consecutive words of what is read of one passage.

    Raises UsageError for k or sentences below 1.
    """

    def __init__(self, index: Searches, k: int = DEFAULT_K, sentences: int | None = None, *, quote: bool = False):
        if k < 1:
            raise UsageError(f"k: at least 1 passage is needed, {k} asked for")
        if sentences is not None and sentences < 1:
            raise UsageError(f"--sentences: at least 1 is needed, {sentences} given")
        self.index, self.k, self.sentences, self.quote = index, k, sentences, quote

    def warm(self) -> None:
        """Load what searches need, and compare the encoder, before the first question. Raises what `Index.search` raises."""
        self.index.search("warm", 1)

    def ground(self, messages: Sequence[Message], fits: Callable[[list[Message]], bool]) -> Grounding:
        """The conversation with the passages that fit, best first. Raises DataError where its last message is no question."""
        *before, last = messages
        question = last.get("content")
        if last.get("role") != "user" or not isinstance(question, str) or not question.strip():
            raise DataError("an index answers questions: the last message must be a user's, with text")
        hits = self.index.search(question, self.k)
        for kept in range(len(hits), 0, -1):
            read = hits[:kept]
            grounded = [*before, {**last, "content": prompt(question, read, self.sentences)}]
            if fits(grounded):
                return Grounding(messages=grounded, hits=tuple(read), quoted=self._quoted(question, read))
        return Grounding(
            messages=[*before, {**last, "content": prompt(question, ())}], hits=(), quoted=self._quoted(question, ())
        )

    def _quoted(self, question: str, hits: Sequence[Hit]) -> tuple[str, ...] | None:
        if not self.quote:
            return None
        return tuple(" ".join(text.split()) for text in _read(question, hits, self.sentences))

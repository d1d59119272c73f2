"""Conversations longer than the context: which turns the model still reads, by rule, and which it doesn't.

drop: the oldest exchanges go. summarise: the model sums up what goes in a few lines, which stay. retrieve: of what goes, the
exchanges that share most words with the last question stay. System messages and the last exchange always stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luban.core.bm25 import BM25, words
from luban.generate.cache import PromptTooLong
from luban.generate.sampling import Sampling
from luban.serve.engine import Engine

Message = Mapping[str, Any]
Rule = Literal["error", "drop", "summarise", "retrieve"]
SUMMARY_TOKENS = 128
RETRIEVED = 32  # exchanges at the most, of those that share words with the question
SUMMARISE = "Sum up the conversation so far in at most three sentences. Keep names, numbers and decisions."
SUMMARY = "Summary of the earlier conversation: "


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What of a conversation is sent to the model."""

    messages: list[dict[str, Any]]
    dropped: list[dict[str, Any]] = field(default_factory=list)  # messages that the model doesn't read, in order
    summary: str = ""  # what stands in their place

    def note(self) -> str:
        """What was left out, for people; "" where nothing was."""
        if not self.dropped:
            return ""
        count = len(self.dropped)
        how = ", summed up" if self.summary else ""
        return f"{count} earlier {'message' if count == 1 else 'messages'} left out of the context{how}"


class History:
    """Fits conversations into a model's context by one rule.

    Args:
        rule: see the module; error: too long a conversation is refused.
        answer_tokens: of the context that are kept for the answer.
        tokens: counts a conversation's tokens, raising PromptTooLong where the context can't hold them. None: those that the
            model's chat template makes.
    """

    def __init__(
        self,
        engine: Engine,
        rule: Rule,
        *,
        answer_tokens: int = 256,
        tokens: Callable[[Sequence[Message]], Sequence[int]] | None = None,
    ):
        self.engine, self.rule, self.tokens = engine, rule, tokens or engine.tokens_of
        context = engine.model.spec.context
        self.most = max(context - answer_tokens, context // 2)
        self._summaries: dict[int, str] = {}  # of the first so many exchanges, so that each is summed up once

    def fit(self, messages: Sequence[Message]) -> Fitted:
        """The messages that the model is to read.

        Raises:
            DataError (PromptTooLong): the last exchange alone is too long, or the rule is error.
        """
        whole = [dict(message) for message in messages]
        if self.rule == "error" or self._fits(whole):
            return Fitted(messages=whole)
        system, exchanges = _exchanges(whole)
        if self.rule == "retrieve":
            return self._retrieved(system, exchanges)
        fewest = bisect_left(
            range(len(exchanges)), True, lo=1, key=lambda first: self._fits([*system, *_flat(exchanges[first:])])
        )
        for first in range(fewest, len(exchanges)):
            gone, kept = _flat(exchanges[:first]), _flat(exchanges[first:])
            if self.rule == "drop":
                return Fitted(messages=[*system, *kept], dropped=gone)
            summary = self._summary(exchanges, first)
            told = [*system, *kept] if not summary else _with_note(system, kept, SUMMARY + summary)
            if self._fits(told):
                return Fitted(messages=told, dropped=gone, summary=summary)
        return self._last(system, exchanges)

    def _last(self, system: list[dict[str, Any]], exchanges: list[list[dict[str, Any]]]) -> Fitted:
        """The last exchange alone; one that is too long is left to the engine to refuse."""
        return Fitted(messages=[*system, *exchanges[-1]], dropped=_flat(exchanges[:-1]))

    def _retrieved(self, system: list[dict[str, Any]], exchanges: list[list[dict[str, Any]]]) -> Fitted:
        """The last exchanges as far as half of the context holds them, then the likeliest earlier ones, in their order."""
        question = words(_text(exchanges[-1]))
        earlier = [words(_text(exchange)) for exchange in exchanges[:-1]]
        scores = BM25(earlier).scores(question)
        kept = {len(exchanges) - 1}
        best = sorted(range(len(earlier)), key=lambda place: (-scores[place], -place))[:RETRIEVED]
        for place in best:
            chosen = _flat([exchanges[i] for i in sorted({*kept, place})])
            if scores[place] > 0 and self._fits([*system, *chosen]):
                kept.add(place)
        for place in reversed(range(len(earlier))):  # the tokens that are left go to what was said last
            chosen = _flat([exchanges[i] for i in sorted({*kept, place})])
            if place not in kept and not self._fits([*system, *chosen]):
                break
            kept.add(place)
        return Fitted(
            messages=[*system, *_flat([exchanges[i] for i in sorted(kept)])],
            dropped=_flat([exchange for i, exchange in enumerate(exchanges) if i not in kept]),
        )

    def _fits(self, messages: Sequence[Message]) -> bool:
        """Whether the context holds the messages and an answer."""
        try:
            return len(self.tokens(messages)) <= self.most
        except PromptTooLong:
            return False

    def _summary(self, exchanges: list[list[dict[str, Any]]], first: int) -> str:
        """The model's summary of the first exchanges, each time of the last summary and as much of what came after it as the
        context holds. An exchange that is too long for it isn't summed up."""
        place = max((place for place in self._summaries if place <= first), default=0)
        summary = self._summaries.get(place, "")
        while place < first:
            told, stop = [], first
            while stop > place:
                told = _flat(exchanges[place:stop])
                told = _with_note([], told, SUMMARY + summary) if summary else told
                told.append({"role": "user", "content": SUMMARISE})
                if self._fits(told):
                    break
                stop -= 1
            if stop > place:
                sampling = Sampling(max_tokens=SUMMARY_TOKENS, temperature=0)
                summary = " ".join(self.engine.generate(told, sampling)[0].text.split()) or summary
            place = max(stop, place + 1)
            self._summaries[place] = summary
        return summary


def _exchanges(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """(system messages at the beginning, exchanges: each a user's message with what follows it)."""
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    found: list[list[dict[str, Any]]] = []
    for message in messages[start:]:
        if message["role"] == "user" or not found:
            found.append([])
        found[-1].append(message)
    return messages[:start], found or [[]]


def _flat(exchanges: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [message for exchange in exchanges for message in exchange]


def _text(exchange: Sequence[Message]) -> str:
    return "\n".join(str(message.get("content") or "") for message in exchange)


def _with_note(system: list[dict[str, Any]], kept: list[dict[str, Any]], note: str) -> list[dict[str, Any]]:
    """The messages with a note before the first that isn't the system's: in its message where there is one, as templates
    often take no second one."""
    if system:
        return [*system[:-1], {**system[-1], "content": f"{system[-1]['content']}\n\n{note}"}, *kept]
    return [{"role": "system", "content": note}, *kept]

"""Where in a filled chat template the assistant's words are, for templates that don't say so themselves.

Published templates hold no `{% generation %}` blocks, so the places are found by filling the template again. With marks in
the messages' strings it shows where each message's words came to stand; filled with the messages before an answer and
the generation prompt it shows where the answer begins. An answer ends with the first token behind its words that ends a
generation. Nothing is guessed: a filling that isn't the same text without its marks is not used, and an answer whose
place isn't certain is refused by its number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from luban.core.errors import DataError
from luban.core.log import warn
from luban.tokenizer.marks import Fill, Marked, Messages, find, text_of
from luban.tokenizer.template import CLOSE, OPEN

ENDLESS = "the chat template ends answers without a special token, so the model isn't taught where to end"
ADVICE = "put {% generation %} … {% endgeneration %} around what the assistant writes"


def mark_answers(
    page: str,
    messages: Messages,
    fill: Fill,
    specials: re.Pattern[str],
    stops: re.Pattern[str],
    *,
    prompt: bool = False,
) -> str:
    """`page` with OPEN and CLOSE around what the assistant is to write in each of its turns, end-of-turn token included.

    Args:
        page: the template, filled with `messages`.
        fill: fills the same template with other messages.
        specials: matches special tokens; `messages` hold none that it matches.
        stops: matches the tokens that end a generation.
        prompt: whether the page ends with a generation prompt.

    Raises:
        DataError: names the first turn whose place isn't certain.
    """
    search = _Search(page, messages, fill, specials, stops, find(page, messages, fill, prompt))
    pieces, cursor = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = search.answer(turn)
        if start < cursor:
            raise _refusal(turn, "puts its words before those of an earlier turn")
        pieces += [page[cursor:start], OPEN, page[start:stop], CLOSE]
        cursor = stop
    return "".join([*pieces, page[cursor:]])


def _refusal(turn: int, why: str) -> DataError:
    return DataError(
        f"turn {turn + 1} of the conversation, the assistant's: the chat template {why}, so that what is to "
        f"be trained on is not certain: {ADVICE}"
    )


@dataclass(frozen=True)
class _Words:
    """Where a turn's words stand."""

    before: int  # where the words before them end
    first: int  # their first mark
    last: int  # their last mark
    after: int  # where the next words begin
    whole: bool  # whether they are one string of which both ends are known


@dataclass(frozen=True)
class _Search:
    """Looks for answers in a page."""

    page: str
    messages: Messages
    fill: Fill
    specials: re.Pattern[str]
    stops: re.Pattern[str]
    known: Marked

    def answer(self, turn: int) -> tuple[int, int]:
        """(start, stop) of what the assistant is to write in this turn."""
        words = self._words(turn)
        prompt = self._prefix(self.messages[:turn], prompt=True)
        if words is None:
            return self._between(turn, prompt)
        if prompt is None or not words.before <= len(prompt) <= words.first:
            return self._start(turn, words), self._stop(turn, words)
        start, opening = len(prompt), self.opening
        if opening and (found := self.page.rfind(opening, start, words.first)) >= 0:
            start = found + len(opening)
        return start, self._stop(turn, words)

    @cached_property
    def opening(self) -> str:
        """The usual generation prompt. Behind a tool's result some templates leave it out, though the page has it."""
        turn = next(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        without, with_prompt = (self._prefix(self.messages[:turn], prompt=prompt) for prompt in (False, True))
        return with_prompt[len(without) :] if without is not None and with_prompt is not None else ""

    def _words(self, turn: int) -> _Words | None:
        """Where the words of a turn are; None where no mark says so."""
        places = self.known.places
        numbers = [place.number for place in places]
        own = [i for i, place in enumerate(places) if place.mark.turn == turn and numbers.index(place.number) == i]
        self._require_all(turn, {places[i].mark.field for i in own})
        if not own:
            return None
        if any(
            place.mark.turn == turn and place.mark.field != "call" and numbers.count(place.number) > 1
            for place in places
        ):
            raise _refusal(turn, "repeats its words")  # of a call, the turn of its result may repeat the name
        first, last = own[0], own[-1]
        if any(place.mark.turn != turn for place in places[first:last]):
            raise _refusal(turn, "mixes its words with another turn's")
        ends = ["content"] if places[first].mark.empty else ["content"] * 2
        whole = self.known.modes[turn].starts and [places[i].mark.field for i in own] == ends
        return _Words(
            before=next((p.position for p in reversed(places[:first]) if p.mark.turn != turn), 0),
            first=places[first].position,
            last=places[last].position,
            after=next((p.position for p in places[last:] if p.mark.turn != turn), len(self.page)),
            whole=whole,
        )

    def _require_all(self, turn: int, found: set[str]) -> None:
        """Refuse what the template leaves out of a turn, where marks can tell."""
        message, mode = self.messages[turn], self.known.modes[turn]
        if text_of(message.get("content")).strip() and "content" in mode.fields and "content" not in found:
            if "call" not in found:
                raise _refusal(turn, "leaves out its words")
            warn("the chat template leaves out what an assistant says beside its tool calls")

    def _prefix(self, messages: Messages, *, prompt: bool) -> str | None:
        """The template filled with the first messages, where the page begins with it."""
        try:
            text = self.fill(messages, prompt)
        except DataError:
            return None
        return text if self.page.startswith(text) else None

    def _start(self, turn: int, words: _Words) -> int:
        """Where an answer begins, by what stands between the words before it and its own.

        A generation prompt stands there too; what follows it is the answer's. Where the page has another header (such
        as one without the thinking that the prompt opens), the answer's own words begin it.
        """
        header, between = self._header(turn), self.page[words.before : words.first]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(header, between, strict=False)))
        if header and same == len(header):
            return words.before + same
        if words.whole:
            text = text_of(self.messages[turn].get("content"))
            lead = text[: len(text) - len(text.lstrip())]
            kept = next(n for n in range(len(lead), -1, -1) if between.endswith(lead[len(lead) - n :]))
            return words.first - kept
        ends = [found.end() for found in re.finditer(rf"{self.specials.pattern}|\n", between) if found.end() <= same]
        if not ends:
            raise _refusal(turn, "begins it in another way than its generation prompt")
        return words.before + ends[-1]

    def _header(self, turn: int) -> str:
        """The template's text between the previous turn's content and the start of the assistant's."""
        text, places = self.known.again(self.messages[:turn], self.fill, True) or ("", [])
        return text[places[-1].position :] if places else text

    def _stop(self, turn: int, words: _Words) -> int:
        """Where an answer ends: behind the token that ends it, or behind its words where there is none."""
        if found := self.stops.search(self.page, words.last, words.after):
            return found.end()
        whole = self._prefix(self.messages[: turn + 1], prompt=False)
        if whole is not None and (found := self.specials.search(self.page, words.last, len(whole))):
            return found.end()
        if self.messages[turn].get("tool_calls"):  # what closes a call would be cut off
            raise _refusal(turn, "ends its tool calls without a token that ends a generation")
        warn(ENDLESS)
        return words.last

    def _between(self, turn: int, prompt: str | None) -> tuple[int, int]:
        """An answer of which no mark is known: from its generation prompt to what ends it before the next words."""
        if prompt is None:
            raise _refusal(turn, "changes with what is in it, and with what follows")
        whole = self._prefix(self.messages[: turn + 1], prompt=False)
        if whole is None:
            later = [
                place.position
                for place in self.known.places
                if place.mark.turn > turn and place.position >= len(prompt)
            ]
            found = self.stops.search(self.page, len(prompt), min(later)) if later else None
            if not found:
                raise _refusal(turn, "changes with what follows it")
            return len(prompt), found.end()
        ends = self.stops if self.stops.search(whole, len(prompt)) else self.specials
        tail = re.search(rf"(?:(?:{ends.pattern})\s*)+\Z", whole[len(prompt) :])
        found = ends.search(whole, len(prompt) + tail.start()) if tail else self.stops.match(self.page, len(whole))
        if not found:
            warn(ENDLESS)
        return len(prompt), found.end() if found else len(whole)

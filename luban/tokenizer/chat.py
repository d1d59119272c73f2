"""Conversation → tokens: the one function behind training, serving and scoring.

A conversation's text cannot become a special token. Before a template is filled, every place in the
messages that spells a special token, or could help to spell one, gets a guard character; afterwards a
special token counts as the template's own only if it has no guard inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache, partial
from typing import Any

from luban.core.errors import DataError
from luban.tokenizer.answers import mark_answers
from luban.tokenizer.calls import fill_calls
from luban.tokenizer.marks import THOUGHTS
from luban.tokenizer.special import ROLES, unknown_role
from luban.tokenizer.template import CLOSE, GUARD, OPEN, fill
from luban.tokenizer.tokenizer import Tokenizer, without_surrogates


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered conversation, in token positions."""

    role: str  # whose words; several roles without an answer between them are joined by "+"
    start: int  # first token
    stop: int  # one past the last token
    trained: bool  # whether these tokens are targets


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    token_ids: list[int]
    find_spans: Callable[[], list[Span]]  # only training pays for finding them

    @cached_property
    def spans(self) -> list[Span]:
        """Whose tokens are whose; cover `token_ids` without gaps.

        Raises:
            DataError: an answer whose place in the filled template isn't certain; names its turn.
        """
        return self.find_spans()

    @property
    def loss_mask(self) -> list[bool]:
        """One a token: true where it is a target, which is assistant text and its end-of-turn token.

        Raises:
            DataError: as `spans`, where any mask would be a guess.
        """
        return [span.trained for span in self.spans for _ in range(span.start, span.stop)]


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """Turn a conversation into token ids, loss mask and spans, by the tokenizer's chat template.

    What the assistant writes is what stands in the template's `{% generation %}` blocks; in a template that has none it
    is found by filling the template again (`luban.tokenizer.answers`).

    Args:
        messages: `{"role": …, "content": …}` in order; an assistant's may have `tool_calls`, as OpenAI's API has them, and
            `weight` 0, which makes its answer no target.
        add_generation_prompt: end where the assistant is to begin.
        tools: descriptions of the tools that may be called, as JSON schemas.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        DataError: no template, no messages, an unknown role, or a conversation that the template refuses, or whose tools
            or calls of tools it leaves out.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"tokenizer {tokenizer.path or ''} has no chat template: give it a chat_template.jinja")
    specials = _special_pattern(tuple(tokenizer.special))
    guarded = [_guard_message(message, tokenizer, specials) for message in messages]
    if not guarded:
        raise DataError("a conversation needs at least one message")
    offered = [_guard(tool, specials, tuple(tokenizer.special)) for tool in tools] if tools else None
    given = _guard(dict(variables or {}), specials, tuple(tokenizer.special))
    own = {**given, **_own(tokenizer)}
    fill_with = partial(_fill, tokenizer, {**own, "tools": offered})
    guarded, marked = fill_calls(guarded, fill_with, add_generation_prompt)
    if offered and marked == _fill(tokenizer, own, guarded, add_generation_prompt):
        raise DataError(
            "the chat template has no place for tools, so the model would not see them: use another template"
        )
    page = _Page.read(marked, specials)
    ids, offsets = _tokenise(page, tokenizer, _borders(marked, guarded, fill_with, specials))

    def find_spans() -> list[Span]:
        known = page
        if not page.answers and any(message["role"] == "assistant" for message in guarded):
            stops = _special_pattern(tuple(tokenizer.token(i) or "" for i in tokenizer.stop_ids))
            filled = mark_answers(marked, guarded, fill_with, specials, stops, prompt=add_generation_prompt)
            known = _Page.read(filled, specials)
        return _spans(known, offsets, messages)

    return Rendered(token_ids=ids, find_spans=find_spans)


def _fill(
    tokenizer: Tokenizer, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], prompt: bool
) -> str:
    return fill(tokenizer.chat_template or "", messages, {**variables, "add_generation_prompt": prompt})


def _own(tokenizer: Tokenizer) -> dict[str, Any]:
    """The variables that every filling has; of one moment, since some templates hold the date."""
    settings = tokenizer.settings
    return {
        "tools": None,
        "documents": None,
        "strftime_now": datetime.now().strftime,
        "bos_token": settings.bos_token or "",
        "eos_token": settings.eos_token or "",
        "pad_token": settings.pad_token or "",
        "unk_token": settings.unk_token or "",
    }


# Guarding what people wrote -------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _special_pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


@lru_cache(maxsize=32)
def _edges(specials: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every proper beginning and every proper end of a special token."""
    heads = {special[:i] for special in specials for i in range(1, len(special))}
    tails = {special[i:] for special in specials for i in range(1, len(special))}
    return tuple(heads), tuple(tails)


def _guard_message(message: Mapping[str, Any], tokenizer: Tokenizer, pattern: re.Pattern[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else message
        raise DataError(unknown_role(role))
    if message.get("content") is None and not (message["role"] == "assistant" and message.get("tool_calls")):
        raise DataError(f"a message of role {message['role']!r} has no content")
    specials = tuple(tokenizer.special)
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    if thought is not None:  # templates read it under different names
        message = {"thinking": thought, **message, "reasoning_content": thought}
    return {key: value if key == "role" else _guard(value, pattern, specials) for key, value in message.items()}


def _guard(value: Any, pattern: re.Pattern[str], specials: tuple[str, ...]) -> Any:
    """`value` with guards in every string of it."""
    if isinstance(value, Mapping):
        return {key: _guard(item, pattern, specials) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guard(item, pattern, specials) for item in value]
    if not isinstance(value, str):
        return value
    text = without_surrogates(value)  # our own marks are lone surrogates
    text = pattern.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)
    heads, tails = _edges(specials)
    body = text.strip()
    if body.startswith(tails) or (body and any(body in special for special in specials)):
        text = text.replace(body, GUARD + body, 1)
    if body.endswith(heads):
        text = text[: len(text.rstrip())] + GUARD + text[len(text.rstrip()) :]
    return text


# Reading the filled template ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    """A filled template without its marks."""

    text: str
    answers: list[tuple[int, int]]  # character ranges of the generation blocks
    specials: list[tuple[int, int]]  # character ranges of the template's own special tokens
    forged: bool  # whether what people wrote spells a special token

    @classmethod
    def read(cls, marked: str, pattern: re.Pattern[str]) -> _Page:
        kept, answers, start, length = [], [], 0, 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
            if piece == OPEN:
                start = length
            elif piece == CLOSE:
                answers.append((start, length))
            else:
                kept.append(piece)
                length += len(piece)
        plain = "".join(kept)
        if GUARD not in plain:
            return cls(plain, answers, [found.span() for found in pattern.finditer(plain)], False)

        def at(position: int) -> int:
            """Where a position of `plain` is once the guards are gone."""
            return position - plain.count(GUARD, 0, position)

        text = plain.replace(GUARD, "")
        own = [(at(found.start()), at(found.end())) for found in pattern.finditer(plain)]
        return cls(
            text, [(at(a), at(b)) for a, b in answers], own, own != [found.span() for found in pattern.finditer(text)]
        )


def _borders(
    marked: str, messages: Sequence[Mapping[str, Any]], fill_with: Callable[..., str], specials: re.Pattern[str]
) -> list[int]:
    """Where answers begin behind the prompt that a model reads before it writes them, of those whose first character could
    become one token with the prompt's last: white space."""
    found = []
    for turn, message in enumerate(messages):
        content = message.get("content")
        if turn and message["role"] == "assistant" and isinstance(content, str) and content[:1].isspace():
            with suppress(DataError):  # a template that refuses the shorter conversation
                prompt = fill_with(messages[:turn], True)
                if marked.startswith(prompt):
                    found.append(len(_Page.read(prompt, specials).text))
    return found


def _tokenise(page: _Page, tokenizer: Tokenizer, borders: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each the range of characters it covers. No token covers a border: a model that answers has read what
    stands before it."""
    encode, stops = tokenizer.encode_plain, list(page.specials)
    if not page.forged:
        ids, offsets = tokenizer.encode_marked(page.text)
        if not any(first < border < last for border in borders for first, last in offsets):
            return ids, offsets
        encode, stops = tokenizer.encode_marked, []
    ids, offsets, position = [], [], 0
    for start, stop in sorted([*stops, *((border, border) for border in borders), (len(page.text), len(page.text))]):
        if position < start:  # where a page is forged, ordinary text, in which nothing is special
            piece, ranges = encode(page.text[position:start])
            ids += piece
            offsets += [(a + position, b + position) for a, b in ranges]
        if start < stop:
            ids.append(tokenizer.special[page.text[start:stop]])
            offsets.append((start, stop))
        position = stop
    return ids, offsets


def _spans(page: _Page, offsets: list[tuple[int, int]], messages: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Stretches of tokens, answers and what stands between them, in order. An answer of weight 0 is no target."""
    spans: list[Span] = []
    roles = [str(message["role"]) for message in messages]
    cursor = turn = 0
    for start, stop in page.answers:
        first = cursor
        while first < len(offsets) and offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(offsets) and offsets[last][0] < stop:
            last += 1
        before = turn
        while turn < len(roles) and roles[turn] != "assistant":
            turn += 1
        if first > cursor:
            spans.append(Span("+".join(roles[before:turn]) or "assistant", cursor, first, False))
        if last > first:
            weight = messages[turn].get("weight") if turn < len(messages) else None
            spans.append(Span("assistant", first, last, weight in (None, 1)))
        cursor, turn = last, turn + 1
    if cursor < len(offsets):
        spans.append(Span("+".join(roles[turn:]) or "assistant", cursor, len(offsets), False))
    return spans

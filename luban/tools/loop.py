"""Answering with tools: the model writes calls, they are made, their results are read, until it answers in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from luban.core.errors import ConfigError
from luban.generate.cache import PromptTooLong
from luban.generate.sampling import Sampling
from luban.serve.api.tool_formats import ToolCall, ToolFormat, ToolParser, format_of
from luban.serve.engine import Engine
from luban.tokenizer.chat import render
from luban.tools.tool import Outcome, Tool, call_tool, shorten

REASONS = {"stop": "answer", "length": "length"}  # the engine's → ours
SHORTEST = 64  # bytes to which results are shortened for the context, at the most


@dataclass(frozen=True, kw_only=True)
class ToolLimits:
    """What one answer may cost. Raises ConfigError for a limit that isn't larger than 0 (calls: at least 0)."""

    calls: int = 8  # of tools; after them the model has to answer in words
    call_seconds: float = 10.0  # a call
    seconds: float = 300.0  # in all, generation included
    result_bytes: int = 8192  # of UTF-8 of a call's result

    def __post_init__(self) -> None:
        for name in ("call_seconds", "seconds", "result_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be larger than 0, {getattr(self, name)} given")
        if self.calls < 0:
            raise ConfigError(f"calls must be 0 or more, {self.calls} given")


@dataclass(frozen=True, kw_only=True)
class MadeCall:
    """A call and what it came to."""

    name: str
    arguments: str  # JSON
    outcome: Outcome


@dataclass(kw_only=True)
class ToolRun:
    """What answering with tools gave."""

    text: str = ""  # the answer in words
    messages: list[dict[str, Any]] = field(default_factory=list)  # new ones: calls, results, the answer
    calls: list[MadeCall] = field(default_factory=list)
    # answer: the model ended it; length: max_tokens did; calls: it was made to answer after the last call; seconds: time did
    ended: Literal["answer", "length", "calls", "seconds"] = "answer"


def run_tools(
    engine: Engine,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Tool],
    sampling: Sampling | None = None,
    *,
    limits: ToolLimits = ToolLimits(),
    on_text: Callable[[str], None] = lambda text: None,
    on_call: Callable[[MadeCall], None] = lambda call: None,
) -> ToolRun:
    """Answer a conversation with tools that the model may call, in its chat template's own format.

    Names and arguments of calls are held to the tools and their schemas while they are generated. A tool that raises,
    hangs or gives too much doesn't end the answer: the model reads what happened. A tool that hung isn't called again.

    Args:
        messages: as `luban.tokenizer.chat.render` takes them.
        tools: their names must differ.
        sampling: of each of the model's turns; its structure is replaced. None: as generation_config.json says.
        limits: see `ToolLimits`.
        on_text, on_call: told of text as it comes and of calls as they end.

    Raises:
        DataError: a chat template without a known format of calls, or a conversation too long for the context.
        ConfigError: two tools of one name, or a schema that can't be followed.
        MissingExtra: llguidance isn't installed.
    """
    named = {tool.name: tool for tool in tools}
    if len(named) < len(tools):
        raise ConfigError(f"two tools have the same name, {', '.join(tool.name for tool in tools)}: rename one")
    turns = _Turns(engine, tools, sampling or engine.model.generation.sample({}), time.monotonic() + limits.seconds)
    run, history, hung = ToolRun(), [dict(message) for message in messages], set()
    while True:
        may_call = len(run.calls) < limits.calls and bool(tools)
        text, calls, reason = turns.answer(history, on_text, may_call=may_call)
        run.text += text
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [call.as_openai() for call in calls]
        run.messages.append(message)
        history.append(message)
        if not calls or reason == "seconds":
            run.ended = "calls" if reason == "answer" and not may_call and tools else reason
            return run
        for call in calls:
            outcome = _made(call, named, hung, limits, over=len(run.calls) >= limits.calls, until=turns.until)
            made = MadeCall(name=call.name, arguments=call.arguments, outcome=outcome)
            run.calls.append(made)
            on_call(made)
            result = {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": outcome.text}
            run.messages.append(result)
            history.append(result)


def _made(
    call: ToolCall, tools: Mapping[str, Tool], hung: set[str], limits: ToolLimits, *, over: bool, until: float
) -> Outcome:
    """The outcome of a call; one that isn't allowed is not made."""
    if over:
        return Outcome(text=f"error: not called, the limit of {limits.calls} calls is reached", failed=True)
    if call.name not in tools:
        return Outcome(text=f"error: there is no tool {call.name} (known: {', '.join(tools)})", failed=True)
    if call.name in hung:
        return Outcome(text=f"error: {call.name} is still running and can't be called again", failed=True)
    seconds = max(min(limits.call_seconds, until - time.monotonic()), 0.0)
    outcome = call_tool(tools[call.name], call.arguments, seconds=seconds, limit=limits.result_bytes)
    if outcome.hung:
        hung.add(call.name)
    return outcome


def conversation_tokens(engine: Engine, tools: Sequence[Tool]) -> Callable[[Sequence[Mapping[str, Any]]], list[int]]:
    """A function that gives a conversation's tokens as `run_tools` sends them, for what fits it into the context.

    Raises:
        DataError: tools, and a chat template without a known format of calls.
    """
    if not tools:
        return engine.tokens_of
    tokenizer, definitions = engine.model.need_tokenizer(), [tool.definition() for tool in tools]
    format_of(tokenizer)

    def tokens(messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return engine.tokens_of(render(messages, tokenizer, add_generation_prompt=True, tools=definitions).token_ids)

    return tokens


class _Turns:
    """The model's turns of one answer."""

    def __init__(self, engine: Engine, tools: Sequence[Tool], sampling: Sampling, until: float):
        self.engine, self.sampling, self.until = engine, sampling, until
        self.definitions = [tool.definition() for tool in tools]
        self.form: ToolFormat = format_of(engine.model.need_tokenizer())
        functions = [(tool.name, dict(tool.parameters)) for tool in tools]
        self.without = self.form.text_alone()
        self.with_calls = self.form.text_or_calls(functions) if functions else self.without

    def answer(
        self, history: list[dict[str, Any]], on_text: Callable[[str], None], *, may_call: bool
    ) -> tuple[str, list[ToolCall], Literal["answer", "length", "seconds"]]:
        """One turn: its text, its calls, and why it ended."""
        sampling = replace(self.sampling, n=1, structure=self.with_calls if may_call else self.without)
        parser, shown, reason = ToolParser(self.form), [], "answer"
        for piece, ended in self._pieces(self._prompt(history), sampling):
            text, _ = parser.push(piece)
            if ended:
                text += parser.finish()[0]
            reason = ended or reason
            if parser.calls and not text.strip():
                continue  # blanks between calls
            shown.append(text)
            on_text(text)
        return "".join(shown), parser.calls, reason  # type: ignore[return-value]

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[tuple[str, str | None]]:
        """Text as it comes, with the reason where it ends."""
        deltas = self.engine.stream(prompt, sampling, self.form.kept())
        for delta in deltas:
            late = delta.finish_reason is None and time.monotonic() > self.until
            yield delta.text, "seconds" if late else REASONS.get(delta.finish_reason or "")
            if late:
                deltas.close()  # type: ignore[attr-defined]
                return

    def _prompt(self, history: list[dict[str, Any]]) -> list[int]:
        """The conversation's tokens. Results of tools that the context can't hold are shortened, the longest first."""
        while True:
            tokens = render(
                history, self.engine.model.need_tokenizer(), add_generation_prompt=True, tools=self.definitions
            ).token_ids
            try:
                return self.engine.tokens_of(tokens)
            except PromptTooLong:
                results = [message for message in history if message["role"] == "tool"]
                longest = max(results, key=lambda message: len(message["content"]), default=None)
                if longest is None or len(longest["content"]) <= SHORTEST:
                    raise
                longest["content"] = shorten(longest["content"], max(len(longest["content"]) // 4, SHORTEST // 2))

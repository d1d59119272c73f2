"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator

from luban.core.errors import DataError
from luban.generate.sampling import MAX_LOGPROBS
from luban.serve.api.bodies import Body

MAX_MESSAGES = 8192
MAX_PARTS = 1024  # of a message, and calls in it
MAX_TOOLS = 128


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None  # as tool_calls were before: refused

    @field_validator("content", "tool_calls", mode="before")
    @classmethod
    def few_parts(cls, value: Any) -> Any:
        """Bounded before each is looked at."""
        if isinstance(value, list) and len(value) > MAX_PARTS:
            raise ValueError(f"at most {MAX_PARTS} parts")
        return value

    def plain(self) -> dict[str, Any]:
        """What a chat template reads, text parts joined. Raises DataError for what it can't."""
        if self.function_call:
            raise DataError("'function_call' in a message is not supported: use 'tool_calls'")
        for call in self.tool_calls or ():
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise DataError("a message's 'tool_calls' need a 'function' with a 'name'")
        kept = {name: getattr(self, name) for name in ("name", "reasoning_content", "tool_calls", "tool_call_id")}
        return {"role": self.role, "content": self._text(), **{name: value for name, value in kept.items() if value}}

    def _text(self) -> str | None:
        if not isinstance(self.content, list):
            return self.content if self.content is not None or self.tool_calls else ""
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
            raise DataError("only text parts are supported in a message's content")
        return "".join(part["text"] for part in self.content)


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of its arguments
    strict: bool | None = None  # hold arguments to the schema also where the model may answer without a call


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The function of a NamedTool."""

    name: str


class NamedTool(BaseModel):
    """`tool_choice` that names the function to be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # none: auto where there are tools
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template, such as enable_thinking

    @field_validator("messages", mode="before")
    @classmethod
    def few_messages(cls, messages: Any) -> Any:
        """Bounded before each is looked at."""
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages")
        return messages

    def refuse_unsupported(self) -> None:
        """As every body, and what only completions have."""
        super().refuse_unsupported()
        if (self.model_extra or {}).get("echo"):
            raise DataError("'echo' is not supported in chats: completions have it")

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token; none when log-probabilities aren't asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    def required(self) -> list[Tool]:
        """The tools of which one must be called; none where the model may answer without. Raises DataError for a choice
        that no tool fits."""
        if self.tool_choice in (None, "auto", "none"):
            return []
        if not self.tools:
            raise DataError("'tool_choice' asks for a call, and 'tools' names none")
        if self.tool_choice == "required":
            return self.tools
        assert isinstance(self.tool_choice, NamedTool)
        name = self.tool_choice.function.name
        found = [tool for tool in self.tools if tool.function.name == name]
        if not found:
            known = ", ".join(tool.function.name for tool in self.tools)
            raise DataError(f"'tool_choice' names '{name}', which is none of the tools ({known})")
        return found

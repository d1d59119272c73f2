"""The bodies of the OpenAI-compatible API, and how they become requests to the engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from luban.core.errors import DataError
from luban.generate.sampling import MAX_LOGPROBS, Sampling
from luban.load.generation import Generation

COMPLETION_TOKENS = 16  # what OpenAI's completions generate when nothing is said


class Body(BaseModel):
    """Fields that both endpoints share. Unknown ones are ignored, as clients send many that change nothing."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None  # must be the served model's name where given
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False
    # what would change the answer and isn't built: refused rather than silently dropped
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def refuse_unsupported(self) -> None:
        """Raise DataError naming a field whose value would be ignored."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias", "tools", "suffix", "echo"):
            if getattr(self, name):
                raise DataError(f"'{name}' is not supported by this server")
        if self.best_of not in (None, self.n):
            raise DataError("'best_of' is not supported by this server")
        if (self.response_format or {}).get("type", "text") != "text":
            raise DataError("'response_format' other than text is not supported by this server")

    def sampling(self, generation: Generation, max_tokens: int, logprobs: int | None) -> Sampling:
        """The engine's form of it: what isn't said is as the model's makers set it, and at most `max_tokens` where they
        set nothing. Raises ConfigError for a value that only together makes no sense."""
        self.refuse_unsupported()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        asked = {name: getattr(self, name) for name in
                 ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")}  # fmt: skip
        return generation.sample({**asked, "stop": None if stop is None else tuple(filter(None, stop)), "n": self.n,
                                  "ignore_eos": self.ignore_eos, "logprobs": logprobs}, max_tokens=max_tokens)  # fmt: skip


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt of the request. Raises DataError where there is none."""
        if not self.prompt:
            raise DataError("'prompt' is empty")
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]  # type: ignore[return-value]


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, str]:
        """With its text parts joined. Raises DataError for parts that aren't text."""
        if isinstance(self.content, list):
            if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
                raise DataError("only text parts are supported in a message's content")
            return {"role": self.role, "content": "".join(part["text"] for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token; none when log-probabilities aren't asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


def error_body(message: str, *, kind: str = "invalid_request_error", param: str | None = None,
               code: str | None = None) -> dict[str, Any]:  # fmt: skip
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

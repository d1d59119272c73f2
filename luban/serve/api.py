"""The bodies of the OpenAI-compatible API, and how they become requests to the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from luban.core.errors import DataError
from luban.generate.sampling import MAX_LOGPROBS, Sampling
from luban.load.generation import Generation
from luban.tokenizer.tokenizer import without_surrogates

ASKED = (  # fields that go to the engine as they are
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
MAX_STOPS = 64
MAX_SEQUENCES = 2048  # answers of one request
MAX_MESSAGES = 8192
MAX_PARTS = 1024  # of a message, and calls in it
COMPLETION_TOKENS = 16  # what OpenAI's completions generate when nothing is said


# Fields of OpenAI's API and of vLLM's that would change the answer and aren't built: refused, as ignoring them is silent.
UNBUILT = (
    "logit_bias",
    "tools",
    "functions",
    "suffix",
    "echo",
    "min_tokens",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    "length_penalty",
    "use_beam_search",
    "prompt_logprobs",
    "include_stop_str_in_output",
    "typical_p",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "continue_final_message",
    "documents",
    "chat_template",
    "reasoning_effort",
    "prediction",
    "audio",
    "web_search_options",
    "verbosity",
    "truncate_prompt_tokens",
)
CHOICES = {
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
}  # what changes nothing


class Body(BaseModel):
    """Fields that both endpoints share. A null is as good as no field, as OpenAI's client sends them. Unknown fields are
    ignored, as clients send many that change nothing; those that would change the answer are refused."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None  # must be the served model's name where given
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None
    best_of: int | None = None

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """Drop what is null."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @field_validator("stop", mode="before")
    @classmethod
    def few_stops(cls, stop: Any) -> Any:
        """Every token is compared with every stop string."""
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} strings")
        return stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def refuse_unsupported(self) -> None:
        """Raise DataError naming a field whose value would be ignored."""
        given = self.model_extra or {}
        for name in UNBUILT:
            if given.get(name):
                raise DataError(f"'{name}' is not supported by this server")
        for name, fine in CHOICES.items():
            if name in given and given[name] not in fine:
                raise DataError(f"'{name}' other than {' or '.join(map(str, fine))} is not supported by this server")
        if self.best_of not in (None, self.n):
            raise DataError("'best_of' is not supported by this server")
        if (self.response_format or {}).get("type", "text") != "text":
            raise DataError("'response_format' other than text is not supported by this server")

    def sampling(self, generation: Generation, max_tokens: int, logprobs: int | None) -> Sampling:
        """The engine's form of it: what isn't said is as generation_config.json sets it, and at most `max_tokens` where they
        set nothing. Raises ConfigError for a value that only together makes no sense."""
        self.refuse_unsupported()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        asked = {name: getattr(self, name) for name in ASKED}
        return generation.sample(
            {
                **asked,
                "stop": None if stop is None else tuple(filter(None, stop)),
                "n": self.n,
                "ignore_eos": self.ignore_eos,
                "logprobs": logprobs,
            },
            max_tokens=max_tokens,
        )


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Any  # a text or token ids, or a list of either
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def known_form(cls, prompt: Any) -> Any:
        """A text, token ids, or a list of either; looked at once, however long it is."""
        several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if len(several) > MAX_SEQUENCES:
            raise ValueError(f"at most {MAX_SEQUENCES} prompts")
        if not all(isinstance(one, str) or (isinstance(one, list) and set(map(type, one)) <= {int}) for one in several):
            raise ValueError("should be a string, a list of token ids, or a list of either")
        return prompt

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


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template, such as enable_thinking

    @field_validator("messages", mode="before")
    @classmethod
    def few_messages(cls, messages: Any) -> Any:
        """Bounded before each is looked at."""
        if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
            raise ValueError(f"at most {MAX_MESSAGES} messages")
        return messages

    @property
    def alternatives(self) -> int | None:
        """How many alternatives a token; none when log-probabilities aren't asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape; what a request spelled may hold lone surrogates, which no response can."""
    message, param = without_surrogates(message), param and without_surrogates(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

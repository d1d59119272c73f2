"""Fields that bodies of the API share, and how they become settings of the engine."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from luban.core.errors import DataError, nearest
from luban.generate.sampling import MAX_BEAMS, MAX_BIASES, MAX_LOGPROBS, Sampling
from luban.generate.structure import Structure
from luban.load.generation import Generation

ASKED = (  # fields that go to the engine as they are
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop_token_ids",
    "min_tokens",
    "prompt_logprobs",
    "seed",
    "n",
    "ignore_eos",
    "length_penalty",
)
MAX_STOPS = 64
MAX_SEQUENCES = 2048  # answers of one request

# Fields of OpenAI's API and of vLLM's that would change the answer and aren't built: refused, as ignoring them is silent.
UNBUILT = (
    "functions",
    "suffix",
    "allowed_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "typical_p",
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
OLD_NAMES = {f"guided_{name}": name for name in ("json", "regex", "choice", "grammar")}  # of `structured_outputs`
CHOICES = {
    "function_call": ("none", "auto"),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
}  # what changes nothing
HARMLESS = frozenset(  # fields of OpenAI's API that say nothing about the answer
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)


class StructuredOutputs(BaseModel):
    """`structured_outputs`: exactly one of them says which texts the answer may be."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")  # a JSON schema
    json_object: bool | None = None  # any JSON object
    regex: str | None = None  # the whole answer matches
    choice: list[str] | None = Field(None, max_length=1024)  # one of them
    grammar: str | None = Field(None, max_length=1 << 18)  # in Lark's notation

    def structure(self) -> Structure:
        """The engine's form of it. Raises DataError unless exactly one is given, ConfigError as `Structure` does."""
        given = {name: value for name in type(self).model_fields if (value := getattr(self, name)) not in (None, False)}
        if self.json_ is False:
            given["json_"] = False
        if len(given) != 1:
            raise DataError("'structured_outputs' needs exactly one of json, json_object, regex, choice, grammar")
        ((name, value),) = given.items()
        if name == "json_object":
            return Structure.json_object()
        return {
            "json_": Structure.json_schema,
            "regex": Structure.regex,
            "choice": Structure.choice,
            "grammar": Structure.grammar,
        }[name](value)


class Body(BaseModel):
    """Fields that both endpoints share. A null is as good as no field, as OpenAI's client sends them. Fields that say nothing
    about the answer are ignored; others that aren't known are refused, as a mistyped name would be ignored silently."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str | None = None  # must be the served model's name where given
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = Field(None, max_length=MAX_BIASES)  # token id → −100 to 100
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS)
    min_tokens: int | None = Field(None, ge=0)
    seed: int | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)  # requests with smaller numbers are served first
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    ignore_eos: bool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    use_beam_search: bool = False  # of width `best_of`, or `n`, in the place of sampling
    best_of: int | None = Field(None, ge=1, le=MAX_BEAMS)
    length_penalty: float | None = None  # of beam search

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

    @field_validator("logit_bias")
    @classmethod
    def as_openai_bounds_them(cls, biases: dict[int, float] | None) -> dict[int, float] | None:
        """From −100 to 100, as OpenAI's API has them."""
        if biases and not all(-100 <= bias <= 100 for bias in biases.values()):
            raise ValueError("should be numbers from -100 to 100")
        return biases

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    def refuse_unsupported(self) -> None:
        """Raise DataError naming a field whose value would be ignored."""
        extra = self.model_extra or {}
        given = {name for name, value in extra.items() if value not in (False, "", [])}
        for name in UNBUILT:
            if name in given:
                raise DataError(f"'{name}' is not supported by this server")
        for name, now in OLD_NAMES.items():
            if name in given:
                raise DataError(f"'{name}' is not supported by this server: use 'structured_outputs': {{'{now}': …}}")
        for name, fine in CHOICES.items():
            if name in extra and extra[name] not in fine:
                raise DataError(f"'{name}' other than {' or '.join(map(str, fine))} is not supported by this server")
        for name in extra.keys() - HARMLESS - {*UNBUILT, *OLD_NAMES, *CHOICES}:
            raise DataError(f"'{name}' is no field of this request{nearest(name, type(self).model_fields)}")
        if not self.use_beam_search and self.best_of not in (None, self.n):
            raise DataError("'best_of' is only supported with 'use_beam_search'")
        if not self.use_beam_search and self.length_penalty not in (None, 1):
            raise DataError("'length_penalty' is only supported with 'use_beam_search'")

    def structure(self) -> Structure | None:
        """The texts among which the answer must be; None: any. Raises DataError for a form that isn't known or two at once,
        ConfigError as `Structure` does."""
        form = self.response_format or {}
        kind = form.get("type", "text")
        if self.structured_outputs is not None:
            if kind != "text":
                raise DataError("'response_format' and 'structured_outputs' both say what the answer must be: use one")
            return self.structured_outputs.structure()
        if kind == "json_object":
            return Structure.json_object()
        if kind == "json_schema":
            holder = form.get("json_schema")
            if not isinstance(holder, dict) or "schema" not in holder:
                raise DataError("'response_format' of type json_schema needs 'json_schema' with a 'schema'")
            return Structure.json_schema(holder["schema"])
        if kind != "text":
            raise DataError("'response_format' must have the type text, json_object or json_schema")
        return None

    def sampling(
        self, generation: Generation, max_tokens: int, logprobs: int | None, structure: Structure | None = None
    ) -> Sampling:
        """The engine's form of it: what isn't said is as generation_config.json sets it, and at most `max_tokens` where they
        set nothing. Raises ConfigError for a value that only together makes no sense.

        Args:
            structure: in the place of the body's own.
        """
        self.refuse_unsupported()
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        asked = {name: getattr(self, name) for name in ASKED}
        asked |= {
            "stop": None if stop is None else tuple(filter(None, stop)),
            "logprobs": logprobs,
            "structure": structure or self.structure(),
            "beams": (self.best_of or self.n) if self.use_beam_search else None,
        }
        return generation.sample(asked, max_tokens=max_tokens)

"""What is asked of a model and what it answers, as plain data that a file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from luban.core.errors import ArtifactError
from luban.core.hashing import data_sha256

Prompt = str | list[dict[str, Any]]  # text, or the messages of a conversation


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base class of requests."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"type": type(self).__name__.lower(), **asdict(self)}

    def key(self, identity: str) -> str:
        """What an answer of the model of this identity is filed under."""
        return data_sha256([identity, self.to_json()])


@dataclass(frozen=True, kw_only=True)
class Score(Request):
    """How likely is `continuation` after `context`?"""

    context: Prompt  # "": nothing but the model's first token
    continuation: str


@dataclass(frozen=True, kw_only=True)
class Roll(Request):
    """How likely is a whole text, read in windows of the context?"""

    text: str


@dataclass(frozen=True, kw_only=True)
class Write(Request):
    """What does the model write after `prompt`?"""

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end the answer and are no part of it
    sample: int = 0  # number of the repeat; temperature above 0: its seed is derived from it
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Response:
    """Base class of answers."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"type": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Scored(Response):
    """Of a `Score`."""

    logprob: float  # nats, of all tokens of the continuation together
    greedy: bool  # whether each of its tokens was the likeliest one
    tokens: int  # of the continuation
    truncated: int = 0  # tokens cut off from the left because the context was full
    prompt_tokens: int = 0  # read before it; 0: not known


@dataclass(frozen=True, kw_only=True)
class Rolled(Response):
    """Of a `Roll`."""

    nats: float  # negative log-likelihood of all tokens
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Written(Response):
    """Of a `Write`."""

    text: str
    finish_reason: str  # stop, or length: cut at max_tokens
    tokens: int = 0  # 0: not known
    prompt_tokens: int = 0
    truncated: int = 0  # tokens of the prompt cut off from the left


@dataclass(frozen=True, kw_only=True)
class Failed(Response):
    """No answer: never scored, asked again by the next run."""

    error: str


RESPONSES: Mapping[str, type[Response]] = {cls.__name__.lower(): cls for cls in (Scored, Rolled, Written)}


def response_from(data: Mapping[str, Any]) -> Response:
    """The response that `to_json` gave. Raises ArtifactError for anything else."""
    fields = dict(data)
    try:
        return RESPONSES[fields.pop("type")](**fields)
    except (KeyError, TypeError):
        raise ArtifactError(f"no response of a model: {str(data)[:80]}") from None

"""What a task needs of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from luban.evals.requests import Prompt, Request, Response


class Backend(Protocol):
    """Answers requests."""

    name: str  # for people
    identity: str  # hash of all that its answers depend on beside the request; what they are cached by
    round_size: int  # requests that are best asked at once

    @property
    def counts(self) -> Counter[str]:
        """What is worth knowing afterwards, such as retries."""
        ...

    def about(self) -> dict[str, Any]:
        """What the artifact says of the model and of how it is asked: BOS, chat template, precision."""
        ...

    def seen(self, prompt: Prompt) -> str:
        """A prompt as the model reads it, special tokens spelled out where they are known."""
        ...

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """One response a request, in their order; `Failed` where there is none."""
        ...

"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from luban.core.errors import DataError
from luban.generate.sampling import MAX_LOGPROBS
from luban.serve.api.bodies import MAX_SEQUENCES, Body

COMPLETION_TOKENS = 16  # what OpenAI's completions generate when nothing is said


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Any  # a text or token ids, or a list of either
    max_tokens: int | None = Field(None, ge=0)  # 0 only with `echo`: the prompt alone
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False  # begin the text, and its log-probabilities, with the prompt

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

    @property
    def prompt_alone(self) -> bool:
        """Whether nothing is to be generated. Raises DataError where nothing is left to answer with."""
        if self.max_tokens == 0 and not self.echo:
            raise DataError("'max_tokens' must be at least 1, or 'echo' true")
        return self.max_tokens == 0

"""Texts of a model, all of which are needed."""

from __future__ import annotations

from collections.abc import Sequence

from luban.core.errors import UnfinishedError
from luban.evals.backends.base import Backend
from luban.evals.requests import Prompt, Request, Write, Written


def write_answers(
    backend: Backend, prompts: Sequence[Prompt], *, max_tokens: int, temperature: float, sample: int, seed: int
) -> list[Written]:
    """What the model writes after each prompt.

    Args:
        max_tokens: of a text.
        sample: number of the draw; the same prompt asked for another one gets another text, unless `temperature` is 0.

    Raises UnfinishedError where a request has no answer.
    """
    asked: list[Request] = [
        Write(prompt=prompt, max_tokens=max_tokens, temperature=temperature, sample=sample, seed=seed)
        for prompt in prompts
    ]
    found = backend.respond(asked)
    answers = [each for each in found if isinstance(each, Written)]
    if len(answers) < len(found):
        error = next(getattr(each, "error", "") for each in found if not isinstance(each, Written))
        raise UnfinishedError(
            f"{len(found) - len(answers)} of {len(found)} requests have no answer ({error}): the same command asks again"
        )
    return answers

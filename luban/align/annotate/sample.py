"""Two answers of a model to each prompt, to be compared."""

from __future__ import annotations

from pathlib import Path

from luban.align.preferences import as_messages
from luban.align.prompts import prompt_of
from luban.core.errors import DataError, UnfinishedError
from luban.core.jsonl import read_rows
from luban.evals.judges.pairs import Match
from luban.evals.requests import Request, Write, Written
from luban.evals.run import EvalOptions, open_backend


def answer_pairs(
    file: Path, model: str, options: EvalOptions, *, max_tokens: int, limit: int = 0, temperature: float = 1.0
) -> list[Match]:
    """Two samples of `model` for each row's prompt (`prompt`, `question`, `instruction` or `messages`); equal ones are left out.

    Raises DataError for a row without a prompt, UnfinishedError where the model doesn't answer.
    """
    backend, _ = open_backend(model, options)
    prompts = []
    for number, row in read_rows(file):
        try:
            prompts.append(as_messages(prompt_of({"prompt": row.get("instruction"), **row}), "user"))
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        if limit and len(prompts) == limit:
            break
    if not prompts:
        raise DataError(f"{file} has no prompt")
    asked: list[Request] = [
        Write(prompt=prompt, max_tokens=max_tokens, temperature=temperature, sample=sample, seed=options.seed)
        for prompt in prompts
        for sample in (0, 1)
    ]
    found = backend.respond(asked)
    matches = []
    for number, prompt in enumerate(prompts):
        first, second = found[2 * number], found[2 * number + 1]
        if not isinstance(first, Written) or not isinstance(second, Written):
            raise UnfinishedError(f"{backend.name} gave no answer to prompt {number + 1} of {file}")
        if first.text != second.text:
            text = "\n\n".join(str(message["content"]) for message in prompt)
            matches.append(
                Match(
                    id=str(number), prompt=text, first="sample 1", second="sample 2", answers=(first.text, second.text)
                )
            )
    if not matches:
        raise DataError(f"{backend.name} gave the same answer twice to every prompt of {file}")
    return matches

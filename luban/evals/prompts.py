"""Shots before an item: which ones, and how they are put together with it."""

from __future__ import annotations

from collections.abc import Sequence

from luban.core.errors import DataError
from luban.core.seeding import generator
from luban.evals.kinds.base import Example
from luban.evals.requests import Prompt
from luban.evals.spec import Chat, Task


def choose_shots(
    task: Task, example: Example, count: int, pool: Sequence[Example], own: bool, seed: int
) -> list[Example]:
    """The `count` worked examples before an item.

    Args:
        pool: what they are chosen from; `own`: these are the task's items, of which the one asked (and any with the same
            question) is left out.

    Raises:
        DataError: too few, or a shot that is the item itself, which would give its answer away.
    """
    if not count:
        return []
    if own:
        pool = [shot for shot in pool if shot.question != example.question]
    if len(pool) < count:
        raise DataError(f"task {task.name}: {count} shots are asked for, and there are only {len(pool)} to choose from")
    if task.spec.fixed_shots or task.spec.shot_order == "first":
        chosen = list(pool[:count])
    else:
        order = generator(seed, "shots", task.name, example.id).permutation(len(pool))[:count]
        chosen = [pool[place] for place in order]
    for shot in chosen:
        if shot.question == example.question:
            raise DataError(
                f"task {task.name}: shot {shot.id} is item {example.id} itself ({example.question[:50]!r}), which would give "
                f"its answer away: take shots from other data"
            )
    return chosen


def build_prompt(task: Task, shots: Sequence[Example], example: Example, chat: Chat) -> tuple[Prompt, str]:
    """(what the model reads, what stands between it and the answer).

    off: description, shots, question as one text. on: the same as one message of the user. turns: the description as the system's
    message, each shot as a message of the user and one of the assistant.
    """
    spec = task.spec
    if chat == "turns":
        messages = [{"role": "system", "content": spec.description}] if spec.description else []
        for shot in shots:
            messages += [
                {"role": "user", "content": shot.question},
                {"role": "assistant", "content": shot.answer},
            ]
        return [*messages, {"role": "user", "content": example.question}], ""
    worked = "".join(f"{shot.question}{spec.target_delimiter}{shot.answer}{spec.shot_delimiter}" for shot in shots)
    if chat == "off":
        return f"{spec.description}{worked}{example.question}", spec.target_delimiter
    messages = [{"role": "system", "content": spec.description}] if spec.description else []
    return [*messages, {"role": "user", "content": f"{worked}{example.question}"}], ""

"""Documents to pack, by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Doc:
    """What `pack` needs of a document."""

    id: str
    text: str
    messages: list[dict[str, str]] | None = None
    tools: list[dict] | None = None


WORDS = ["alpha", "beta", "gamma", "delta", "你好", "été", "<|end|>", "<|eos|>", "x1", "\n"]


def texts(count: int, seed: int, longest: int = 60) -> list[Doc]:
    rng = random.Random(seed)
    return [Doc(f"{seed}-{i}", " ".join(rng.choices(WORDS, k=rng.randint(0, longest)))) for i in range(count)]


def conversations(count: int, seed: int) -> list[Doc]:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [
                {"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))},
                {"role": "assistant", "content": " ".join(rng.choices(WORDS, k=rng.randint(0, 9)))},
            ]
        found.append(Doc(f"{seed}-{i}", "\n".join(m["content"] for m in messages), messages))
    return found

"""Scores of answers by a reward model: of rows of a file, and of token ids that a policy has written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luban.align.preferences import Text, tokenise
from luban.core.errors import DataError, LineageError, UnsupportedError
from luban.core.jsonl import read_rows, write_rows
from luban.core.log import progress
from luban.load.model import LoadedModel, load_model
from luban.models.head.rows import Value
from luban.tokenizer.tokenizer import Tokenizer

TOKENS = 1 << 14  # of a batch, padding included


class RewardModel:
    """A model with a value head, whose scores are shifted so that demonstrations score 0 on average.

    Args:
        model: from `load_model`.

    Raises:
        UnsupportedError: a model without a value head.
    """

    def __init__(self, model: LoadedModel):
        if not isinstance(model.spec.head, Value):
            raise UnsupportedError(
                f"{model.name} is no reward model, its head is {model.spec.head.registry.name_of(type(model.spec.head))}: "
                f"train one with luban reward"
            )
        figures = model.manifest.figures if model.manifest is not None else {}
        self.model, self.offset = model, float(figures.get("score_offset", 0.0))
        self.device = next(model.module.parameters()).device

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: str = "float32") -> RewardModel:
        """Load a reward model. Raises what `load_model` does."""
        return cls(load_model(path, device, dtype))

    def require_tokenizer(self, tokenizer: Tokenizer, owner: str) -> None:
        """Raise LineageError unless token ids and chat template of `owner` mean the same here."""
        own = self.model.need_tokenizer()
        if not own.same_vocabulary(tokenizer):
            raise LineageError(
                f"the reward model {self.model.name} has another vocabulary than {owner}, so it can't score {owner}'s "
                f"tokens: train it from a model of the same family"
            )
        if own.chat_template != tokenizer.chat_template:
            raise LineageError(
                f"the reward model {self.model.name} was trained with another chat template than that of {owner}"
            )

    @torch.inference_mode()
    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The score of each text, prompt and answer as token ids up to the answer's end.

        Raises:
            DataError: a text longer than the context.
        """
        context = self.model.spec.context
        if long := next((len(text) for text in texts if len(text) > context), None):
            raise DataError(
                f"a text of {long} tokens is longer than the context of reward model {self.model.name}, {context}"
            )
        found = np.zeros(len(texts), dtype=np.float64)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for rows in _batches(order, texts):
            longest = len(texts[rows[-1]])
            tokens = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros(len(rows), longest, dtype=torch.bool)
            for at, row in enumerate(rows):
                tokens[at, : len(texts[row])] = torch.tensor(texts[row])
                mask[at, : len(texts[row])] = True
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            found[rows] = self.model.module(tokens, mask).double().cpu().numpy()
        return (found - self.offset).tolist()

    def score(self, prompt: Text, answer: Text) -> float:
        """The score of one answer."""
        return self.scores([tokenise(prompt, answer, self.model.need_tokenizer())[0]])[0]


def _batches(order: list[int], texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(texts[row]) > TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def score_file(reward: RewardModel, file: Path, out: Path) -> int:
    """Write every row of a .jsonl file with a `score`; returns how many there are.

    Rows have `prompt` and `completion` (or `chosen`), text or messages; or `messages`, a conversation. A row with `chosen` and
    `rejected` gets `score` and `rejected_score`.

    Raises:
        DataError: a row that isn't JSON, lacks these fields or is longer than the context; names the line.
    """
    rows: list[dict[str, Any]] = []
    texts: list[list[int]] = []
    places: list[tuple[int, str]] = []
    for number, row in read_rows(file):
        rows.append(row)
        for name, prompt, answer in _answers(row, f"{file}:{number}"):
            try:
                ids = tokenise(prompt, answer, reward.model.need_tokenizer())[0]
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from None
            if len(ids) > reward.model.spec.context:
                raise DataError(
                    f"{file}:{number}: {len(ids)} tokens are more than the reward model's context of "
                    f"{reward.model.spec.context}"
                )
            texts.append(ids)
            places.append((len(rows) - 1, name))
    with progress("scoring", total=len(texts), unit="texts") as bar:
        for (row, name), score in zip(places, reward.scores(texts), strict=True):
            rows[row][name] = score
        bar.advance(len(texts))
    write_rows(out, rows)
    return len(rows)


def _answers(row: dict[str, Any], where: str) -> Iterator[tuple[str, Text, Text]]:
    if isinstance(row.get("messages"), list) and len(row["messages"]) > 1:
        yield "score", row["messages"][:-1], row["messages"][-1:]
        return
    answer = row.get("completion", row.get("chosen"))
    if not row.get("prompt") or not answer:
        raise DataError(f"{where}: a row needs prompt and completion (or chosen), or messages")
    yield "score", row["prompt"], answer
    if row.get("rejected"):
        yield "rejected_score", row["prompt"], row["rejected"]

"""Forms of feedback (scores, rankings, critiques with revisions) as data for each of its uses (Fernandes et al. 2023).

Rows are of one of two forms: `prompt`, `responses` and `scores` (or `ranks`), the higher the better; or `prompt`, `response`,
`critique` and `revision`. Pairs (`chosen`, `rejected`; or `instruction`, `output_1`, `output_2` and `preference`, as AlpacaEval writes
them) count as two responses with scores 1 and 0, those of a tie are equal. Scores of rows with an `annotator` are standardised by
annotator, since one person's 3 is another's 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from luban.align.preferences import Text, as_messages, require_text, scores_of
from luban.core.errors import DataError
from luban.core.jsonl import read_rows, write_rows
from luban.core.log import warn
from luban.evals.judges.pairs import match_of

Use = Literal["preferred", "revised", "pairs", "rankings", "unpaired", "conditioned", "critic"]
FIELDS = (  # texts of a row
    *("prompt", "response", "critique", "revision", "chosen", "rejected"),
    *("instruction", "output_1", "output_2"),
)
SHARES = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}  # scores of a pair
BINS = 5  # of scores, for conditioning
CONTROL = "Quality wanted, from 1 to {most}: {wanted}."  # the sentence that the wanted score is asked for by


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """One row: responses with scores, or a critique of the first one with its revision."""

    prompt: Text
    responses: tuple[Text, ...]
    scores: tuple[float, ...]
    critique: str = ""
    annotator: str = ""  # who gave the scores; empty: not said

    def __post_init__(self):
        for text in (self.prompt, *self.responses):
            require_text(text)

    @property
    def best(self) -> Text:
        """The response with the highest score, the first of equals."""
        return self.responses[int(np.argmax(self.scores))]


def convert(file: Path, out: Path, use: Use) -> int:
    """Write feedback as the .jsonl file that a use of it takes; returns how many rows that has.

    preferred, revised: conversations for `luban sft`, on the best response or on the revision; conditioned: conversations on
    every response, its score asked for by `conditioned_prompt`; critic: on the critique and then the revision.
    pairs, rankings, unpaired: for `luban reward` and `luban dpo`; unpaired labels a response as wanted where its score is at or
    above the median of all responses, and above the lowest score. Rows with an empty text are left out, which is said.

    Raises:
        DataError: a row of neither form, or no row that has what the use needs.
    """
    found, empty = [], Counter[str]()
    for number, row in read_rows(file):
        if name := next((name for name in FIELDS if name in row and not row[name]), ""):
            empty[name] += 1
            continue
        if "output_1" in row:
            row = _scored(row, number, file)
        try:
            found.append(_feedback(row))
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
    for name, times in empty.items():
        warn(f"{file}: {times} rows are left out, since their {name} is empty")
    found = standardised(found)
    every = [score for each in found for score in each.scores]
    edges, least = _edges(every), _least_wanted(every)
    rows = [row for each in found for row in _rows(each, use, edges, least)]
    if not rows:
        needs = "critique and revision" if use in ("revised", "critic") else "responses with different scores"
        raise DataError(f"{file} has no row with {needs}, which --use {use} needs")
    write_rows(out, rows)
    return len(rows)


def _scored(row: dict[str, Any], number: int, file: Path) -> dict[str, Any]:
    """A pair as AlpacaEval writes it, as responses with scores."""
    match = match_of(row, str(number), f"{file}:{number}")
    if match.human is None:
        raise DataError(
            f"{file}:{number}: a pair needs its preference (1, 2, or 0 for a tie); luban annotate labels pairs"
        )
    return {"prompt": match.prompt, "responses": list(match.answers), "scores": list(SHARES[match.human])}


def _feedback(row: dict[str, Any]) -> Feedback:
    if row.get("prompt") and row.get("responses"):
        scores, annotator = scores_of(row["responses"], row.get("scores", row.get("ranks"))), row.get("annotator", "")
        if annotator and "scores" not in row:
            annotator = ""  # ranks are of one prompt's responses: there is nothing to compare between prompts
        return Feedback(
            prompt=row["prompt"], responses=tuple(row["responses"]), scores=scores, annotator=str(annotator)
        )
    if all(row.get(name) for name in ("prompt", "response", "critique", "revision")):
        responses = (row["response"], row["revision"])
        return Feedback(prompt=row["prompt"], responses=responses, scores=(0.0, 1.0), critique=row["critique"])
    if all(row.get(name) for name in ("prompt", "chosen", "rejected")):
        return Feedback(prompt=row["prompt"], responses=(row["chosen"], row["rejected"]), scores=(1.0, 0.0))
    raise DataError(
        "a row needs prompt, responses and scores; or prompt, response, critique and revision; or prompt, chosen and rejected; or "
        "instruction, output_1, output_2 and preference"
    )


def standardised(rows: Sequence[Feedback]) -> list[Feedback]:
    """Rows with the scores of each annotator shifted and divided to mean 0 and standard deviation 1 over all their responses (an
    annotator whose scores are all equal: 0). Rows without an annotator stay as they are."""
    given: dict[str, list[float]] = {}
    for each in rows:
        given.setdefault(each.annotator, []).extend(each.scores)
    scale = {
        name: (float(np.mean(scores)), float(np.std(scores)) if len(set(scores)) > 1 else 1.0)
        for name, scores in given.items()
        if name
    }
    found = []
    for each in rows:
        mean, spread = scale.get(each.annotator, (0.0, 1.0))
        found.append(replace(each, scores=tuple((score - mean) / spread for score in each.scores)))
    return found


def _edges(scores: Sequence[float]) -> np.ndarray:
    """Borders between bins of scores: quantiles over all responses, those that coincide once."""
    return np.unique(np.quantile(scores or [0.0], np.arange(1, BINS) / BINS, method="higher"))


def quantiles_of(scores: np.ndarray, pool: np.ndarray, bins: int) -> list[int]:
    """In which of `bins` quantiles of a pool of scores each score is, 0 being the lowest; scores of the pool's highest are in the
    highest, however many there are."""
    edges = np.quantile(pool, np.arange(1, bins) / bins, method="higher")
    return np.searchsorted(edges, scores, side="right").tolist()


def _least_wanted(scores: Sequence[float]) -> float:
    """The least score of a wanted response: the median of all, or where that is the lowest score, the next one above it.
    Infinite where all scores are equal."""
    lowest = min(scores, default=math.inf)
    above = [score for score in scores if score > lowest]
    return max(min(above), float(np.quantile(scores, 0.5, method="higher"))) if above else math.inf


def _rows(each: Feedback, use: Use, edges: np.ndarray, least: float) -> Iterator[dict[str, Any]]:
    if (use == "preferred" and len(set(each.scores)) > 1) or (use == "revised" and each.critique):
        yield _conversation(each.prompt, each.best)
    elif use == "critic" and each.critique:
        answer = as_messages(each.responses[0], "assistant")
        asked = [{"role": "user", "content": "Criticise this answer, then write a better one."}]
        revision = as_messages(each.best, "assistant")[-1]["content"]
        said = f"{each.critique}\n\n{revision}"
        yield {"messages": [*as_messages(each.prompt, "user"), *answer, *asked, *as_messages(said, "assistant")]}
    elif use == "pairs":
        for i, j in combinations(range(len(each.scores)), 2):
            if each.scores[i] != each.scores[j]:
                better, worse = (i, j) if each.scores[i] > each.scores[j] else (j, i)
                yield {"prompt": each.prompt, "chosen": each.responses[better], "rejected": each.responses[worse]}
    elif use == "rankings" and len(set(each.scores)) > 1:
        yield {"prompt": each.prompt, "responses": list(each.responses), "ranks": list(each.scores)}
    elif use == "unpaired" and least < math.inf:
        for response, score in zip(each.responses, each.scores, strict=True):
            yield {"prompt": each.prompt, "completion": response, "label": score >= least}
    elif use == "conditioned":
        for response, score in zip(each.responses, each.scores, strict=True):
            wanted = int(np.searchsorted(edges, score, side="right")) + 1
            yield _conversation(conditioned_prompt(each.prompt, wanted, len(edges) + 1), response)


def _conversation(prompt: Text, response: Text) -> dict[str, Any]:
    return {"messages": [*as_messages(prompt, "user"), *as_messages(response, "assistant")]}


def conditioned_prompt(prompt: Text, wanted: int, most: int) -> list[dict[str, Any]]:
    """The prompt with a sentence before its last message that asks for the score `wanted` of 1 … `most` (reward conditioning)."""
    messages = as_messages(prompt, "user")
    last = messages[-1]
    control = CONTROL.format(wanted=wanted, most=most)
    return [*messages[:-1], {**last, "content": f"{control}\n{last['content']}"}]

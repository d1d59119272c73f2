"""A fact in a long text: does the model repeat it when asked at the end? By length of the text and depth of the fact
(Kamradt 2023, "Needle in a haystack"; here scored by the answer's own tokens, so that models that only continue texts can be asked).

Rows are held-out documents one after another with one sentence put between two of theirs. The row ends with that sentence's
beginning, and the fact counts as found where every token of its end is the likeliest one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from luban.core.errors import DataError
from luban.core.seeding import generator
from luban.evals.altered_sentence import sentences_of
from luban.evals.task import Material, Outcome
from luban.load.model import LoadedModel
from luban.models.base import require_next_token

SHORTEST = 128  # tokens of the shortest row
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the sentence stands, as a share of the text
TRIALS = 4  # rows a cell, unless a limit is given
MARGIN = 8  # tokens that words may take more where texts meet
PLACES = ("Lisbon", "Oslo", "Quito", "Riga", "Sofia", "Tunis", "Hanoi", "Lima", "Cairo", "Dublin")
SENTENCE = " The secret number of {place} is {number}. "
QUESTION = " The secret number of {place} is"


def lengths_of(context: int) -> list[int]:
    """Row lengths in tokens: the context, and halves of it down to `SHORTEST`."""
    found = [context]
    while found[-1] // 2 >= SHORTEST:
        found.append(found[-1] // 2)
    return found[::-1]


def row_of(model: LoadedModel, text: str, length: int, depth: float, place: str, number: int) -> tuple[list[int], int]:
    """(token ids of at most `length`, how many of the last are the answer). The sentence stands at the sentence boundary nearest
    to `depth`.

    Raises DataError where the text is too short for the row.
    """
    tokenizer = model.need_tokenizer()
    needle, question = (form.format(place=place, number=number) for form in (SENTENCE, QUESTION))
    taken = sum(len(tokenizer.encode(part)) for part in (needle, question, f" {number}")) + MARGIN
    _, ranges = tokenizer.encode_plain(text[: 12 * length])
    available = length - taken
    if available < 1 or len(ranges) < available:
        raise DataError(
            f"needle: a row of {length} tokens needs {available} of held-out text, and {len(ranges)} are there"
        )
    spans = sentences_of(text[: ranges[available - 1][1]])
    ends = [0, *(end for _, end in spans[: max(len(spans) - 1, 1)])]  # the last sentence is cut off
    kept = text[: ends[-1]]
    at = min(ends, key=lambda end: abs(end - depth * len(kept)))
    asked = kept[:at].rstrip() + needle + kept[at:].strip() + question
    head = tokenizer.encode(asked, bos=model.begins_with_bos)
    whole = tokenizer.encode(f"{asked} {number}", bos=model.begins_with_bos)
    same = next((i for i, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1]), len(head))
    return whole, len(whole) - same


class Needle:
    """`luban eval MODEL needle --corpus CORPUS`; `--limit` is the number of rows in a cell."""

    needs = "text"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        """Share of facts found, over all and by length; a row for every text."""
        require_next_token(model.spec, "needle")
        text = "\n".join(document.text for document in material.text)
        rows = []
        for length in lengths_of(model.spec.context):
            for depth in DEPTHS:
                rows += [self._row(model, text, length, depth, trial, precision) for trial in range(limit or TRIALS)]
        figures = {"needle_accuracy": float(np.mean([row["found"] for row in rows]))}
        for length in lengths_of(model.spec.context):
            figures[f"needle_{length}"] = float(np.mean([row["found"] for row in rows if row["length"] == length]))
        return Outcome(figures, rows)

    def _row(
        self, model: LoadedModel, text: str, length: int, depth: float, trial: int, precision: str
    ) -> dict[str, object]:
        draw = generator(0, "needle", length, int(100 * depth), trial)
        begin = int(draw.integers(max(len(text) - 12 * length, 1)))
        if trial == 0 or begin > len(text) // 2:
            begin = 0  # what is there must suffice
        ids, answer = row_of(
            model, text[begin:], length, depth, str(draw.choice(PLACES)), int(draw.integers(10_000, 100_000))
        )
        began = time.perf_counter()
        found, logprob = likeliest(model, ids, answer, precision)
        seconds = time.perf_counter() - began
        return {
            "length": length,
            "depth": depth,
            "trial": trial,
            "tokens": len(ids),
            "found": found,
            "logprob": logprob,
            "seconds": seconds,
        }


@torch.inference_mode()
def likeliest(model: LoadedModel, ids: Sequence[int], count: int, precision: str) -> tuple[bool, float]:
    """(whether each of the last `count` tokens is the likeliest after those before it, their summed log-probability in nats)."""
    module = model.module
    device = next(module.parameters()).device
    with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
        hidden = module(torch.tensor([ids[:-1]], device=device), output="hidden")[:, -count:]
        logits = module.read(hidden)[0].float()
    wanted = torch.tensor(ids[-count:], device=device)
    logprobs = logits.log_softmax(-1).gather(1, wanted[:, None])
    return bool((logits.argmax(-1) == wanted).all()), float(logprobs.sum())

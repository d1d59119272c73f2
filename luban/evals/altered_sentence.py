"""A book with one sentence that belongs to another book: is it what surprises the model most, and does it need the whole book to see?

The original is not given. A document may say which sentence is to be replaced by which: {"meta": {"altered": {"start", "stop",
"text"}}}, the first two in characters, one that contradicts what was told long before, say. Otherwise the sentence comes from about
the same place of another held-out document and has about as many tokens, so that it is fluent and plausible by itself. Sentences are ranked by the mean negative log-probability of their tokens, once
with everything before them in view and once with a window of 4,096 tokens: the control, which should rank it lower.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luban.core.errors import DataError
from luban.core.seeding import generator
from luban.corpus.document import Document
from luban.evals.likelihood import windows
from luban.evals.task import Material, Outcome
from luban.load.model import LoadedModel
from luban.models.base import require_next_token

WINDOW = 4096  # tokens of the control, or half of the model's context where that is less
BOOKS = 10  # altered texts, unless a limit is given
SHORTEST = 5  # tokens of a sentence that is ranked
SENTENCE = re.compile(r"[^.!?。!?]+[.!?。!?]+[\"'”’)]*\s*|[^.!?。!?]+$")


@dataclass(frozen=True)
class Altered:
    """A text with a foreign sentence."""

    text: str
    sentences: list[tuple[int, int]]  # character ranges
    changed: int  # which of them is foreign
    original: str


def sentences_of(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, in order; together they are the whole text."""
    return [found.span() for found in SENTENCE.finditer(text)]


def altered(text: str, other: str, number: int) -> Altered | None:
    """The text with a sentence of its last half replaced by one of the other text at about the same place and of about its length;
    None where there is no such sentence. `number` decides which."""
    mine, theirs = sentences_of(text), sentences_of(other)
    late = [i for i, (begin, end) in enumerate(mine) if begin > len(text) / 2 and end - begin > 20]
    rng = generator(0, "altered sentence", number)
    for i in rng.permutation(late).tolist():
        begin, end = mine[i]
        place = begin / len(text)
        alike = [(a, b) for a, b in theirs if abs((b - a) / (end - begin) - 1) < 0.3 and other[a:b] not in text]
        if alike:
            a, b = min(alike, key=lambda span: abs(span[0] / len(other) - place))
            return _replaced(text, mine, i, other[a:b].rstrip())
    return None


def marked(document: Document) -> Altered | None:
    """The document's text with the sentence replaced that it names; None where it names none.

    Raises:
        DataError: it names no sentence of its text.
    """
    where = (document.meta or {}).get("altered")
    if where is None:
        return None
    text, found = document.text, sentences_of(document.text)
    if not isinstance(where, dict) or not isinstance(where.get("text"), str):
        raise DataError(
            f"document {document.id}: meta's 'altered' needs 'start', 'stop' and 'text', the sentence put there"
        )
    for i, (begin, end) in enumerate(found):
        if (begin, begin + len(text[begin:end].rstrip())) == (where.get("start"), where.get("stop")):
            return _replaced(text, found, i, where["text"].rstrip())
    raise DataError(
        f"document {document.id}: no sentence begins at character {where.get('start')} and ends at {where.get('stop')}, as meta's 'altered' says"
    )


def _replaced(text: str, sentences: list[tuple[int, int]], i: int, other: str) -> Altered:
    """The text with another sentence in the place of the i-th, and the spaces behind that."""
    begin, end = sentences[i]
    tail = text[begin:end][len(text[begin:end].rstrip()) :]
    changed = text[:begin] + other + tail + text[end:]
    shift = len(changed) - len(text)
    spans = [*sentences[:i], (begin, end + shift), *((x + shift, y + shift) for x, y in sentences[i + 1 :])]
    return Altered(changed, spans, i, text[begin:end])


@torch.inference_mode()
def surprises(model: LoadedModel, ids: Sequence[int], context: int) -> list[float]:
    """Negative log-probability in nats of every token after the first, each with at least half of `context` tokens before it
    where the text has so many."""
    device, found = next(model.module.parameters()).device, []
    for window in windows(ids, [True] * len(ids), context, max(1, context // 2)):
        tokens, targets = (torch.tensor([row], device=device) for row in (window.tokens, window.targets))
        logprobs, _ = model.module.head(model.module(tokens, output="hidden"), targets, reduce="none")
        found += [-value for value, counts in zip(logprobs[0].tolist(), window.scored, strict=True) if counts]
    return found


def sentence_means(
    values: Sequence[float], ranges: Sequence[tuple[int, int]], sentences: Sequence[tuple[int, int]]
) -> list[float]:
    """Mean surprise of every sentence, −∞ for those of fewer than 5 tokens.

    Args:
        values: of the tokens. ranges: their characters.
    """
    sums, counts, at = [0.0] * len(sentences), [0] * len(sentences), 0
    for value, (begin, _) in zip(values, ranges, strict=True):
        while at + 1 < len(sentences) and begin >= sentences[at][1]:
            at += 1
        sums[at], counts[at] = sums[at] + value, counts[at] + 1
    return [total / n if n >= SHORTEST else float("-inf") for total, n in zip(sums, counts, strict=True)]


class AlteredSentence:
    """`luban eval MODEL altered_sentence --corpus BOOKS`; `--limit` is the number of books."""

    needs = "text"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        """Rank of the foreign sentence in view of everything, and with the window."""
        require_next_token(model.spec, "altered_sentence")
        tokenizer, context = model.need_tokenizer(), model.spec.context
        documents, rows = material.text, []
        if len(documents) < 2 and not any((document.meta or {}).get("altered") for document in documents):
            raise DataError(f"altered_sentence needs two held-out documents or more, {len(documents)} found")
        for number, document in enumerate(documents):
            if len(rows) == (limit or BOOKS):
                break
            made = marked(document)
            if made is None:
                text = document.text
                ids, ranges = tokenizer.encode_plain(text)
                kept = text if len(ids) < context else text[: ranges[context - 2][0]]  # a token is for the beginning
                made = altered(kept, documents[(number + 1) % len(documents)].text, number)
            if made is None:
                continue
            ids, ranges = tokenizer.encode_plain(made.text)
            if len(ids) >= context and made.sentences[made.changed][1] > ranges[context - 2][0]:
                continue  # the model doesn't read so far
            rows.append(self._row(model, made, ids[: context - 1], ranges[: context - 1]))
        if not rows:
            raise DataError(
                "no held-out document has a sentence that one of another could stand for: give longer texts"
            )
        figures = {
            f"{name}_first": sum(row[f"{name}_rank"] == 1 for row in rows) / len(rows) for name in ("whole", "window")
        }
        figures |= {
            f"{name}_rank": sum(row[f"{name}_rank"] for row in rows) / len(rows) for name in ("whole", "window")
        }
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("tokens", "seconds")}
        return Outcome({f"altered_{name}": value for name, value in {**figures, **means}.items()}, rows)

    def _row(self, model: LoadedModel, made: Altered, ids: list[int], ranges: list[tuple[int, int]]) -> dict:
        begin = model.need_tokenizer().bos_id
        if not model.begins_with_bos or begin is None:
            ids, ranges, first = ids, ranges[1:], None
        else:
            ids, first = [begin, *ids], begin
        began = time.perf_counter()
        row: dict = {"changed": made.changed, "original": made.original, "tokens": len(ids) - (first is not None)}
        most = model.spec.context
        for name, context in (("whole", most), ("window", min(WINDOW, max(2, len(ids) // 2)))):
            means = sentence_means(surprises(model, ids, context), ranges, made.sentences)
            row[f"{name}_rank"] = 1 + sum(mean > means[made.changed] for mean in means)
            row[f"{name}_surprise"] = means[made.changed]
            if name == "whole":
                row["seconds"] = time.perf_counter() - began
        return row

"""How well an index finds the passages that answer questions: top-k accuracy and mean reciprocal rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luban.core.errors import DataError
from luban.core.log import progress
from luban.core.metrics.answers import contains_answer
from luban.core.metrics.bootstrap import interval
from luban.retrieval.fusion import Fusion
from luban.retrieval.index import Index, Retriever
from luban.retrieval.passages import Passage
from luban.retrieval.questions import Question

BATCH = 64  # questions encoded together


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to search an index."""

    name: str
    retriever: Retriever
    fusion: Fusion = "zscore"


def methods_of(index: Index) -> list[Method]:
    """Every way in which an index can be searched."""
    if index.retriever == "hybrid":
        return [
            Method(name="bm25", retriever="bm25"),
            Method(name="dense", retriever="dense"),
            Method(name="hybrid, reciprocal rank", retriever="hybrid", fusion="reciprocal"),
            Method(name="hybrid, z-scores", retriever="hybrid"),
        ]
    return [Method(name=index.retriever, retriever=index.retriever)]


def answers_of(index: Index, questions: Sequence[Question]) -> Callable[[Question, Passage], bool]:
    """What counts as a right passage: where the questions name documents that the index holds, one that holds a place of the
    answer; else one in which the words of an answer stand (DPR's measure, which is more lenient)."""
    held = {name for segment in index.segments for name, _, _ in segment.documents}
    if any(question.source in held for question in questions):
        return _holds_span
    return lambda question, passage: contains_answer(passage.text, question.answers)


def _holds_span(question: Question, passage: Passage) -> bool:
    return question.source == passage.source and any(
        passage.start <= start and stop <= passage.stop for start, stop in question.spans
    )


def ranks(index: Index, questions: Sequence[Question], method: Method, depth: int, batch: int = BATCH) -> list[int]:
    """For each question the rank (from 1) of the first right passage among the `depth` best; 0 where there is none."""
    right, found = answers_of(index, questions), []
    with progress(f"searching: {method.name}", total=len(questions), unit="questions") as bar:
        for first in range(0, len(questions), batch):
            group = questions[first : first + batch]
            lists = index.search_batch(
                [question.text for question in group], depth, retriever=method.retriever, fusion=method.fusion
            )
            for question, hits in zip(group, lists, strict=True):
                places = (number for number, hit in enumerate(hits, 1) if right(question, hit.passage))
                found.append(next(places, 0))
            bar.advance(len(group))
    return found


def evaluate_retrieval(index: Index, questions: Sequence[Question], ks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each method: `method`, `top_K` and its 95% interval `top_K_interval` for every K, `mrr` (0 beyond the largest
    K).

    Raises DataError where no question has an answer.
    """
    asked = [question for question in questions if question.answers]
    if not asked:
        raise DataError("no question has an answer to be found")
    rows = []
    for method in methods_of(index):
        found = ranks(index, asked, method, max(ks))
        row: dict[str, Any] = {"method": method.name, "questions": len(asked)}
        for k in ks:
            right = [float(0 < rank <= k) for rank in found]
            row[f"top_{k}"] = sum(right) / len(right)
            row[f"top_{k}_interval"] = interval(right)
        row["mrr"] = sum(1 / rank for rank in found if rank) / len(found)
        rows.append(row)
    return rows

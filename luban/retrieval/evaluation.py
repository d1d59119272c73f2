"""How well an index finds the passages that answer questions: top-k accuracy and mean reciprocal rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.artifact import MANIFEST, ArtifactWriter, as_parent, write_json
from luban.core.errors import DataError
from luban.core.log import progress
from luban.core.metrics.answers import contains_answer
from luban.core.metrics.bootstrap import interval
from luban.retrieval.fusion import Fusion
from luban.retrieval.index import Index, Retriever
from luban.retrieval.passages import Passage
from luban.retrieval.questions import Question
from luban.retrieval.reranking import Reranked

BATCH = 64  # questions encoded together


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to search an index."""

    name: str
    retriever: Retriever | None
    fusion: Fusion = "zscore"
    reranked: Reranked | None = None  # searched instead of the index


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
    inside = (passage.start <= start and stop <= passage.stop for start, stop in question.spans)
    return question.source == passage.source and (not question.spans or any(inside))


def ranks(index: Index, questions: Sequence[Question], method: Method, depth: int, batch: int = BATCH) -> list[int]:
    """For each question the rank (from 1) of the first right passage among the `depth` best; 0 where there is none."""
    right, found = answers_of(index, questions), []
    with progress(f"searching: {method.name}", total=len(questions), unit="questions") as bar:
        for first in range(0, len(questions), batch):
            group = questions[first : first + batch]
            texts = [question.text for question in group]
            if method.reranked is not None:
                lists = [method.reranked.search(text, depth) for text in texts]
            else:
                lists = index.search_batch(texts, depth, retriever=method.retriever, fusion=method.fusion)
            for question, hits in zip(group, lists, strict=True):
                places = (number for number, hit in enumerate(hits, 1) if right(question, hit.passage))
                found.append(next(places, 0))
            bar.advance(len(group))
    return found


def evaluate_retrieval(
    index: Index, questions: Sequence[Question], ks: Sequence[int], *, reranked: Reranked | None = None
) -> list[dict[str, Any]]:
    """A row for each method: `method`, `top_K` and its 95% interval `top_K_interval` for every K, `mrr` (0 beyond the largest
    K).

    Raises DataError where no question has an answer.
    """
    asked = [question for question in questions if question.answers]
    if not asked:
        raise DataError("no question has an answer to be found")
    rows, methods = [], methods_of(index)
    if reranked is not None:
        methods.append(Method(name=f"{index.retriever}, re-ranked", retriever=None, reranked=reranked))
    for method in methods:
        found = ranks(index, asked, method, max(ks))
        row: dict[str, Any] = {"method": method.name, "questions": len(asked)}
        for k in ks:
            right = [float(0 < rank <= k) for rank in found]
            row[f"top_{k}"] = sum(right) / len(right)
            row[f"top_{k}_interval"] = interval(right)
        row["mrr"] = sum(1 / rank for rank in found if rank) / len(found)
        rows.append(row)
    return rows


def write_evaluation(
    out: Path, index: Path, questions: Path, rows: Sequence[dict[str, Any]], answers: dict[str, Any] | None
) -> None:
    """An evaluation artifact with the figures as `retrieval_METHOD_top_K` (METHOD in letters, digits and `_`), its parents the
    index and, where the questions are those of a corpus, the corpus."""
    parents = [as_parent("index", index)]
    if (questions / MANIFEST).is_file():
        parents.append(as_parent("corpus", questions))
    figures = {
        f"retrieval_{re.sub(r'[^a-z0-9]+', '_', row['method'])}_{name}": value
        for row in rows
        for name, value in row.items()
        if name == "mrr" or (name.startswith("top_") and not name.endswith("interval"))
    }
    figures["retrieval_questions"] = rows[0]["questions"]
    figures |= {f"retrieval_answers_{name}": value for name, value in (answers or {}).items()}
    with ArtifactWriter(out, kind="evaluation", config={"questions": questions.name}, parents=tuple(parents)) as art:
        write_json(art.path / "figures.json", {"retrieval": list(rows), "answers": answers})
        art.note(**figures)

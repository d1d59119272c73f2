"""Questions with right and wrong passages, from a file of questions: what a sentence encoder is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.core.metrics.answers import contains_answer
from luban.core.seeding import derive
from luban.retrieval.bm25 import BM25, Postings
from luban.retrieval.fusion import top
from luban.retrieval.questions import Question
from luban.retrieval.terms import terms

MINED = 20  # best passages of BM25 among which wrong ones are looked for

Text = tuple[str, str]  # title and text of a passage


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question to train on."""

    question: str
    right: Text
    wrong: tuple[Text, ...]  # look alike and hold no answer


def split(questions: Sequence[Question], heldout: float, seed: int) -> tuple[list[Question], list[Question]]:
    """(training, held out): questions about one passage are on the same side, so that held-out passages are never trained on."""
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        if question.positives:
            title, text = question.positives[0]
            sides[is_heldout(f"{title}\0{text}", heldout, seed)].append(question)
    return sides


def is_heldout(key: str, heldout: float, seed: int) -> bool:
    """Whether what is named `key` belongs to the fraction `heldout`, which depends on the seed and nothing else."""
    return derive(seed, "heldout", key) < heldout * 2**63


Best = Callable[
    [Sequence[Question], Sequence[Text]], Iterable[np.ndarray]
]  # places of the passages that look right, best first


def by_words(questions: Sequence[Question], collection: Sequence[Text]) -> Iterator[np.ndarray]:
    """BM25's best passages of each question."""
    postings = Postings.build([terms(f"{title} {text}") for title, text in collection])
    bm25 = BM25([(postings, np.ones(len(collection), dtype=bool))])
    for question in questions:
        yield top(bm25.scores(terms(question.text)), MINED)[0]


def mine(questions: Sequence[Question], negatives: int, best: Best = by_words) -> list[Pair]:
    """Pairs with hard negatives: the file's own, then the best passages of the other questions that hold no answer.

    Args:
        best: what passages look right: BM25 is asked, or the encoder that is trained.

    Raises DataError for fewer than two different passages.
    """
    collection = list(dict.fromkeys(question.positives[0] for question in questions))
    if len(collection) < 2:
        raise DataError(f"{len(collection)} passages to train on: at least 2 are needed")
    short = [question for question in questions if len(question.negatives) < negatives]
    found = iter(best(short, collection) if short else ())
    pairs = []
    for question in questions:
        wrong = list(question.negatives[:negatives])
        if len(question.negatives) < negatives:
            wrong += [
                collection[place]
                for place in next(found).tolist()
                if collection[place] not in question.positives
                and not contains_answer(collection[place][1], question.answers)
            ]
        pairs.append(Pair(question=question.text, right=question.positives[0], wrong=tuple(wrong[:negatives])))
    return pairs

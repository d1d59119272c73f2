"""How a generated answer is scored against references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from luban.core import sandbox
from luban.core.errors import ConfigError
from luban.core.metrics import answers as texts
from luban.core.metrics.abstention import Match, Outcome, outcome
from luban.core.metrics.numbers import last_number
from luban.core.metrics.pass_at_k import pass_at_k
from luban.core.metrics.rouge import rouge_l, rouge_n
from luban.core.metrics.translation import corpus_score, sentence_score
from luban.core.registry import Registry, Variant
from luban.evals.filters import Filter
from luban.evals.kinds.base import Example
from luban.evals.measures import Measure, mean_of
from luban.evals.templates import text_of

SCORERS = Registry(
    "metric",
    {
        "equal": "luban.evals.scorers:Equal",
        "exact_match": "luban.evals.scorers:ExactMatch",
        "f1": "luban.evals.scorers:F1",
        "contains": "luban.evals.scorers:Contains",
        "facts": "luban.evals.scorers:Facts",
        "number": "luban.evals.scorers:Number",
        "uses": "luban.evals.scorers:Uses",
        "repetition": "luban.evals.scorers:Repetition",
        "rouge": "luban.evals.scorers:Rouge",
        "bleu": "luban.evals.scorers:Bleu",
        "chrf": "luban.evals.scorers:Chrf",
        "tests": "luban.evals.scorers:Tests",
    },
)


class Scorer(Variant):
    """Base of scorers. One figure by default: the mean over items of the mean over an item's answers."""

    registry = SCORERS
    name = ""
    needs_reference = True  # whether answers are compared with a target

    def one(self, answer: str, example: Example) -> float:
        """The score of one answer, its filters applied."""
        raise NotImplementedError

    def score(self, answers: Sequence[str], example: Example) -> dict[str, float]:
        """The scores of an item's answers, by name."""
        return {self.name: float(np.mean([self.one(answer, example) for answer in answers]))}

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """The figures of scored rows."""
        return [mean_of(rows, self.name)]


@dataclass(frozen=True, kw_only=True)
class Equal(Scorer):
    """The answer is a reference, character by character, white space around both left out."""

    name = "equal"
    filters: tuple[Filter, ...] = ()  # applied to answer and references alike

    def one(self, answer: str, example: Example) -> float:
        """1 or 0."""
        return float(self._reduced(answer) in {self._reduced(reference) for reference in example.references})

    def _reduced(self, text: str) -> str:
        for each in self.filters:
            text = each.apply(text)
        return text.strip()


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Scorer):
    """Equal without case, articles and punctuation (SQuAD)."""

    name = "exact_match"

    def one(self, answer: str, example: Example) -> float:
        """1 or 0."""
        return texts.exact_match(answer, example.references)


@dataclass(frozen=True, kw_only=True)
class F1(Scorer):
    """Harmonic mean of precision and recall of words (SQuAD), of the nearest reference."""

    name = "f1"

    def one(self, answer: str, example: Example) -> float:
        """From 0 to 1."""
        return texts.f1(answer, example.references)


@dataclass(frozen=True, kw_only=True)
class Contains(Scorer):
    """The words of a reference stand in the answer one after another."""

    name = "contains"

    def one(self, answer: str, example: Example) -> float:
        """1 or 0."""
        return float(texts.contains_answer(answer, example.references))


@dataclass(frozen=True, kw_only=True)
class Facts(Scorer):
    """How often the answer is right, says that it doesn't know, or is wrong."""

    name = "facts"
    match: Match = "contains"  # a reference stands in the answer, or is all of it

    def score(self, answers: Sequence[str], example: Example) -> dict[str, float]:
        """`right`, `abstained` and `wrong`, which sum to 1."""
        found = [outcome(answer, example.references, self.match) for answer in answers]
        return {name: found.count(name) / len(found) for name in get_args(Outcome)}

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """The mean of each."""
        return [mean_of(rows, "right"), mean_of(rows, "abstained"), mean_of(rows, "wrong", better="lower")]


@dataclass(frozen=True, kw_only=True)
class Number(Scorer):
    """The final number of the answer is that of a reference (GSM8K)."""

    name = "number"

    def one(self, answer: str, example: Example) -> float:
        """1 or 0."""
        found = last_number(answer)
        return float(found is not None and any(found == last_number(reference) for reference in example.references))


@dataclass(frozen=True, kw_only=True)
class Uses(Scorer):
    """The answer uses a word, in a sentence of at least three words."""

    name = "uses"
    word: str  # template of the word

    def one(self, answer: str, example: Example) -> float:
        """1 or 0."""
        said = texts.answer_tokens(answer)
        return float(len(said) >= 3 and texts.contains_answer(answer, [text_of(self.word, example.row)]))


@dataclass(frozen=True, kw_only=True)
class Repetition(Scorer):
    """The fraction of an answer's n-grams of words that stood in it before; lower is better."""

    name = "repetition"
    needs_reference = False
    n: int = 4  # words

    def one(self, answer: str, example: Example) -> float:
        """From 0 to 1; 0 for fewer words."""
        said = texts.answer_tokens(answer)
        grams = [tuple(said[i : i + self.n]) for i in range(len(said) - self.n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """Its mean."""
        return [mean_of(rows, self.name, better="lower")]


@dataclass(frozen=True, kw_only=True)
class Rouge(Scorer):
    """ROUGE-1, ROUGE-2 and ROUGE-L, F1, of the nearest reference by each."""

    def score(self, answers: Sequence[str], example: Example) -> dict[str, float]:
        """All three."""
        kinds = {
            "rouge1": lambda a, r: rouge_n(a, r, 1),
            "rouge2": lambda a, r: rouge_n(a, r, 2),
            "rougeL": rouge_l,
        }
        return {
            name: float(np.mean([max(compare(answer, r) for r in example.references) for answer in answers]))
            for name, compare in kinds.items()
        }

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """All three."""
        return [mean_of(rows, name) for name in ("rouge1", "rouge2", "rougeL")]


@dataclass(frozen=True, kw_only=True)
class Bleu(Scorer):
    """BLEU of all answers as one corpus, by sacrebleu, from 0 to 100; the first answer to each item counts."""

    name = "bleu"
    language: str = ""  # of the references, such as zh, ja, ko, where words aren't divided by spaces

    def score(self, answers: Sequence[str], example: Example) -> dict[str, float]:
        """Of the sentence alone, with smoothing."""
        return {self.name: sentence_score(self.name, answers[0], example.references, self.language)}  # type: ignore[arg-type]

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """Of the corpus."""
        answers, references = [row["answer"] for row in rows], [row["references"] for row in rows]
        value, interval, signature = corpus_score(self.name, answers, references, self.language)  # type: ignore[arg-type]
        return [Measure(name=self.name, value=value, interval=interval, n=len(rows), note=f"sacrebleu {signature}")]


@dataclass(frozen=True, kw_only=True)
class Chrf(Bleu):
    """chrF2 of all answers as one corpus, by sacrebleu, from 0 to 100."""

    name = "chrf"


@dataclass(frozen=True, kw_only=True)
class Tests(Scorer):
    """pass@k: of k answers one runs and passes its tests, in a process with limits (`luban.core.sandbox`)."""

    needs_reference = False
    tests: str  # template of Python code that raises where the answer is wrong
    before: str = ""  # template of what stands before the answer, such as the beginning of a function
    k: tuple[int, ...] = (1,)  # each at most the task's repeats
    timeout: float = 10.0  # seconds for one answer

    def __post_init__(self):
        if not self.k or min(self.k) < 1 or self.timeout <= 0:
            raise ConfigError(
                f"k must be numbers of at least 1 and timeout positive, {self.k} and {self.timeout} given"
            )

    def score(self, answers: Sequence[str], example: Example) -> dict[str, float]:
        """pass@k for each k, and how many passed."""
        before = text_of(self.before, example.row) if self.before else ""
        tests = text_of(self.tests, example.row)
        passed = sum(sandbox.passes(before + answer, tests, self.timeout) for answer in answers)
        return {f"pass@{k}": pass_at_k(len(answers), passed, k) for k in self.k if k <= len(answers)}

    def measures(self, rows: Sequence[dict[str, Any]]) -> list[Measure]:
        """pass@k for each k."""
        return [mean_of(rows, name) for name in rows[0]["scores"] if name.startswith("pass@")]

"""BLEU and chrF of a corpus of answers, by sacrebleu (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from luban.core.errors import MissingExtra

Name = Literal["bleu", "chrf"]
RESAMPLES = 1000  # of sacrebleu's own bootstrap


def corpus_score(
    name: Name, answers: Sequence[str], references: Sequence[Sequence[str]], language: str = ""
) -> tuple[float, tuple[float, float], str]:
    """(score from 0 to 100, bootstrap interval of 95%, sacrebleu's signature).

    Args:
        references: of each answer, one or more.
        language: of the references; Chinese, Japanese and Korean have their own words in BLEU.

    Raises MissingExtra where sacrebleu isn't installed.
    """
    metric = _metric(name, language)
    most = max(map(len, references))
    padded = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    resampled = RESAMPLES if len(answers) > 1 else 1
    score = metric.corpus_score(list(answers), padded, n_bootstrap=resampled)
    half = score._ci if resampled > 1 else 0.0  # sacrebleu has no public name for it
    mean = score._mean if resampled > 1 else score.score
    return float(score.score), (float(mean - half), float(mean + half)), str(metric.get_signature())


def sentence_score(name: Name, answer: str, references: Sequence[str], language: str = "") -> float:
    """Of one answer, from 0 to 100; BLEU with smoothing and the order that the answer has."""
    return float(_metric(name, language, sentence=True).sentence_score(answer, list(references)).score)


def _metric(name: Name, language: str, sentence: bool = False) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ModuleNotFoundError:
        raise MissingExtra("sacrebleu", "eval", "BLEU and chrF") from None
    return BLEU(trg_lang=language, effective_order=sentence) if name == "bleu" else CHRF()

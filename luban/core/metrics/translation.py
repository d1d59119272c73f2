"""BLEU and chrF of a corpus of answers, by sacrebleu (Post 2018)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from luban.core.errors import MissingExtra
from luban.core.metrics.bootstrap import resamples

Name = Literal["bleu", "chrf"]
RESAMPLES = 1000  # of the bootstrap over answers


def corpus_score(
    name: Name, answers: Sequence[str], references: Sequence[Sequence[str]], language: str = ""
) -> tuple[float, tuple[float, float], str]:
    """(score from 0 to 100, percentile interval of 95% by the bootstrap over answers, sacrebleu's signature).

    Args:
        references: of each answer, one or more.
        language: of the references; Chinese, Japanese and Korean have their own words in BLEU.

    Raises MissingExtra where sacrebleu isn't installed.
    """
    metric = _metric(name, language)
    most = max(map(len, references))
    padded = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    # sacrebleu gives counts of each answer by private methods alone; its own interval, mean ± 1.96 deviations, leaves [0, 100]
    counts = np.asarray(metric._extract_corpus_statistics(list(answers), padded))
    value, *drawn = (
        float(metric._compute_score_from_stats(counts[places].sum(0).tolist()).score)
        for places in (np.arange(len(counts)), *itertools.chain.from_iterable(resamples(len(counts), RESAMPLES)))
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value, (float(low), float(high)), str(metric.get_signature())


def sentence_score(name: Name, answer: str, references: Sequence[str], language: str = "") -> float:
    """Of one answer, from 0 to 100; BLEU with smoothing and the order that the answer has."""
    return float(_metric(name, language, sentence=True).sentence_score(answer, list(references)).score)


def _metric(name: Name, language: str, sentence: bool = False) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ModuleNotFoundError:
        raise MissingExtra("sacrebleu", "eval", "BLEU and chrF") from None
    return BLEU(trg_lang=language, effective_order=sentence) if name == "bleu" else CHRF()

"""ROUGE, pass@k, BLEU, intervals of ratios and tests of differences, against definitions and reference packages."""

from __future__ import annotations

import itertools
import math
import random
from functools import cache

import numpy as np
import pytest

from luban.core.metrics.bootstrap import interval, ratio_interval, resamples, sign_flip_p_value
from luban.core.metrics.numbers import last_number
from luban.core.metrics.pass_at_k import pass_at_k
from luban.core.metrics.rouge import RougePool, longest_common_subsequence, rouge_l, rouge_n, rouge_words

LETTERS = "abcdefgh"


def sentence(rng, least=0, most=60):
    return rng.choices(LETTERS, k=rng.randrange(least, most))


def test_the_longest_common_subsequence_is_that_of_the_recursion():
    rng = random.Random()
    for _ in range(60):
        first, second = sentence(rng, most=25), sentence(rng, most=25)

        @cache
        def longest(i, j, first=first, second=second):
            if i == len(first) or j == len(second):
                return 0
            if first[i] == second[j]:
                return 1 + longest(i + 1, j + 1)
            return max(longest(i + 1, j), longest(i, j + 1))

        assert longest_common_subsequence(first, second) == longest(0, 0)


def test_rouge_of_a_known_pair_and_of_other_scripts():
    # Lin 2004: "police kill the gunman" against "police killed the gunman": the subsequence "police the gunman" of 3 in 4
    assert rouge_l("police kill the gunman", "Police killed the gunman.") == pytest.approx(3 / 4)
    assert rouge_n("police kill the gunman", "police killed the gunman", 2) == pytest.approx(1 / 3)
    assert rouge_words("Straße 12, 你好!") == ["stra", "ß", "e", "12", "你", "好"]
    assert rouge_l("", "a") == rouge_l("a", "") == rouge_n("a", "b", 1) == 0


def test_rouge_agrees_with_googles_package():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    rng = random.Random()
    for _ in range(300):
        text, reference = (" ".join(sentence(rng, 1)) for _ in range(2))
        theirs = scorer.score(reference, text)
        ours = rouge_n(text, reference, 1), rouge_n(text, reference, 2), rouge_l(text, reference)
        assert ours == pytest.approx([theirs[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")], abs=1e-6)


def test_the_pool_finds_the_nearest_text():
    rng = random.Random()
    pool, texts = RougePool(), [" ".join(sentence(rng, 1, 12)) for _ in range(80)]
    for text in texts:
        pool.add(text)
    for _ in range(30):
        new = " ".join(sentence(rng, 1, 12))
        scores = [rouge_l(new, text) for text in texts]
        assert pool.nearest(new) == (max(scores), scores.index(max(scores))) or max(scores) == 0
        assert pool.nearest(new, 0.7)[0] == (max(scores) if max(scores) >= 0.7 else 0)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_passing_sample():
    for samples, passed in ((5, 2), (7, 0), (4, 4), (6, 1)):
        marks = [1] * passed + [0] * (samples - passed)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(marks, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_a_ratios_interval_is_that_of_the_sums_not_of_the_means():
    rng = np.random.default_rng()
    size = rng.integers(1, 100, 60).astype(float)
    above = size * rng.normal(2, 0.3, 60)
    low, high = ratio_interval(above, size)
    assert low < above.sum() / size.sum() < high
    same = ratio_interval(3 * size, size)
    assert same == pytest.approx((3, 3))


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        scores = rng.random(60) < 0.6
        low, high = interval(scores.astype(float), resamples=400)
        hits += low <= 0.6 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_p_value_is_the_share_of_all_signs_and_the_sampled_one_is_near_it():
    rng = random.Random()
    values = [rng.gauss(0.4, 1) for _ in range(9)]
    every = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((1, -1), repeat=9)
    ]
    exact = sum(total >= abs(sum(values)) - 1e-9 for total in every) / len(every)
    assert sign_flip_p_value(values) == pytest.approx(exact)
    assert sign_flip_p_value([*values, *[0.0] * 50]) == pytest.approx(exact)  # ties say nothing
    many = [rng.gauss(0.0, 1) for _ in range(200)]
    z = abs(np.mean(many)) / (np.std(many) / 200**0.5)
    normal = math.erfc(z / 2**0.5)

    assert sign_flip_p_value(many) == pytest.approx(normal, abs=0.04)
    assert sign_flip_p_value([0.0, 0.0]) == 1 and sign_flip_p_value([1.0] * 300) < 1e-3


def test_last_number():
    assert (
        last_number("5 and then #### 1,234") == 1234
        and last_number("costs 3.50, or 4") == 4
        and last_number("") is None
    )


def test_bleu_and_chrf_are_sacrebleus_with_an_interval_around_them():
    sacrebleu = pytest.importorskip("sacrebleu")
    from luban.core.metrics.translation import corpus_score, sentence_score

    rng = random.Random(3)
    answers = [" ".join(sentence(rng, 8, 20)) for _ in range(20)]
    references = [[f"{a} {rng.choice(LETTERS)}", a[::-1]] if i % 2 else [a] for i, a in enumerate(answers)]
    value, (low, high), signature = corpus_score("bleu", answers, references)
    padded = [[r[0] for r in references], [r[1] if len(r) > 1 else None for r in references]]
    assert value == pytest.approx(sacrebleu.corpus_bleu(answers, padded).score) and low <= value <= high + 1e-9
    assert "version" in signature
    assert corpus_score("chrf", ["你好"], [["你好"]])[0] == pytest.approx(100)
    assert sentence_score("bleu", "a b c d", ["a b c d"]) == pytest.approx(100)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleus_interval_is_the_quantiles_of_resampled_corpora(name):
    sacrebleu = pytest.importorskip("sacrebleu")
    from luban.core.metrics.translation import RESAMPLES, corpus_score

    rng = random.Random()
    answers = [" ".join(sentence(rng, 0, 9)) for _ in range(7)]  # short, some of them empty: scores down to 0
    references = [[a if rng.random() < 0.5 else " ".join(sentence(rng, 4, 9))] for a in answers]
    _, found, _ = corpus_score(name, answers, references)
    assert 0 <= found[0] <= found[1] <= 100 + 1e-9
    whole = getattr(sacrebleu, f"corpus_{name}")
    scores = []
    for places in itertools.chain.from_iterable(resamples(len(answers), RESAMPLES)):
        scores.append(whole([answers[i] for i in places], [[references[i][0] for i in places]]).score)
    assert found == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])), abs=1e-6)


def test_answers_that_share_nothing_with_their_references_have_an_interval():
    pytest.importorskip("sacrebleu")
    from luban.core.metrics.translation import corpus_score

    for answers in (["Paris", "Paris"], ["", ""], ["x"]):
        value, interval_, _ = corpus_score("bleu", answers, [["Rome Oslo Paris Bern"]] * len(answers))
        assert value == 0 and interval_ == (0, 0)

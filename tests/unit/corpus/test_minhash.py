"""MinHash beside brute force: estimates within their standard error, recall on the S-curve, planted copies found."""

from __future__ import annotations

import random

import numpy as np
import pytest
from word_patterns import WORD

from luban.corpus.document import Document
from luban.corpus.steps.minhash import BANDS, MINIMA, ROWS, SHINGLE, MinHash, shingles, signature
from luban.corpus.tally import Tally


def true_shingles(text: str) -> set[tuple[str, ...]]:
    found = WORD.findall(text.lower())
    return {tuple(found[i : i + SHINGLE]) for i in range(len(found) - SHINGLE + 1)}


def random_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=4)) for _ in range(count)]


def pair(rng: random.Random, share: float) -> tuple[str, str]:
    """Two texts of which one has `1 - share` of its words changed at its end."""
    one = random_words(rng, 300)
    cut = int(300 * share)
    return " ".join(one), " ".join([*one[:cut], *random_words(rng, 300 - cut)])


def jaccard(one: str, two: str) -> float:
    a, b = true_shingles(one), true_shingles(two)
    return len(a & b) / len(a | b)


def test_shingles_are_the_sets_of_a_plain_loop():
    rng = random.Random(1)
    for length in (0, 4, 5, 6, 200):
        text = " ".join(rng.choices(["one", "two", "Three", "四", "五"], k=length))
        document = Document(id="d", text=text, source="s")
        assert len(np.unique(shingles(document))) == len(true_shingles(text))
    assert signature("only four words here") is None


def test_estimates_are_within_their_standard_error():
    rng = random.Random(2)
    errors = []
    for share in np.linspace(0.1, 0.95, 120):
        one, two = pair(rng, share)
        s = jaccard(one, two)
        estimate = (signature(one) == signature(two)).mean()
        errors.append((estimate - s) / np.sqrt(max(s * (1 - s), 1e-3) / MINIMA))
    assert abs(np.mean(errors)) < 3 / np.sqrt(len(errors))  # unbiased: mean of 120 standard normals
    assert 0.75 < np.std(errors) < 1.25
    assert max(map(abs, errors)) < 4.5


def test_recall_follows_the_s_curve():
    rng = random.Random(3)
    met = expected = variance = 0.0
    for share in np.linspace(0.75, 0.95, 200):
        one, two = pair(rng, share)
        a, b = signature(one).reshape(BANDS, ROWS), signature(two).reshape(BANDS, ROWS)
        probability = 1 - (1 - jaccard(one, two) ** ROWS) ** BANDS
        met += bool((a == b).all(axis=1).any())
        expected += probability
        variance += probability * (1 - probability)
    assert abs(met - expected) < 4 * np.sqrt(variance)


def test_planted_copies_are_dropped_and_nothing_else():
    rng = random.Random(4)
    originals = [random_words(rng, 400) for _ in range(200)]
    texts = [" ".join(text) for text in originals]
    copies = []
    for text in originals[:50]:
        changed = list(text)
        for place in rng.sample(range(400), 4):  # at most 20 of 396 shingles on either side
            changed[place] = "changed"
        copies.append(" ".join(changed))
    documents = [Document(id=str(i), text=text, source="s") for i, text in enumerate([*texts, *copies])]
    tally = Tally()
    kept = [int(d.id) for d in MinHash()(documents, tally)]
    assert kept == list(range(200))
    assert tally.dropped["minhash"]["documents"] == 50
    assert len(tally.samples["minhash"]) == 3


@pytest.mark.parametrize("text", ["", "a b c", "你好"])
def test_short_texts_pass(text):
    documents = [Document(id=str(i), text=text, source="s") for i in range(3)]
    assert len(list(MinHash()(documents, Tally()))) == 3


def test_the_decision_is_that_of_a_plain_loop_over_kept_documents():
    rng = random.Random(5)
    texts = []
    for _ in range(60):
        words_ = random_words(rng, 200)
        for _ in range(rng.randint(1, 5)):  # a family of ever more changed copies
            texts.append(" ".join(words_))
            for place in rng.sample(range(200), rng.randint(0, 8)):
                words_[place] = "changed"
    rng.shuffle(texts)
    kept, expected = [], []
    for number, text in enumerate(texts):
        minima = signature(text)
        bands = [band.tobytes() for band in minima.reshape(BANDS, ROWS)]
        close = [other for other, theirs in kept if any(map(bytes.__eq__, bands, theirs))]
        if not any((other == minima).mean() >= 0.75 for other in close):
            kept.append((minima, bands))
            expected.append(number)
    documents = [Document(id=str(i), text=text, source="s") for i, text in enumerate(texts)]
    assert [int(d.id) for d in MinHash()(documents, Tally())] == expected
    assert len(expected) < len(texts) - 30


def test_estimates_and_meetings_agree_with_datasketch():
    datasketch = pytest.importorskip("datasketch")
    rng = random.Random(6)
    differences, mine, theirs = [], 0, 0
    for share in np.linspace(0.3, 0.98, 80):
        one, two = pair(rng, share)
        s = jaccard(one, two)
        sketches = [datasketch.MinHash(num_perm=MINIMA, seed=7) for _ in range(2)]
        for sketch, text in zip(sketches, (one, two), strict=True):
            sketch.update_batch([" ".join(shingle).encode() for shingle in true_shingles(text)])
        estimate = (signature(one) == signature(two)).mean()
        differences.append((estimate - sketches[0].jaccard(sketches[1])) / np.sqrt(2 * max(s * (1 - s), 1e-3) / MINIMA))
        index = datasketch.MinHashLSH(num_perm=MINIMA, params=(BANDS, ROWS))
        index.insert("one", sketches[0])
        theirs += bool(index.query(sketches[1]))
        mine += bool((signature(one).reshape(BANDS, ROWS) == signature(two).reshape(BANDS, ROWS)).all(axis=1).any())
    assert abs(np.mean(differences)) < 3 / np.sqrt(len(differences))  # two independent estimates of the same number
    assert np.std(differences) < 1.3
    assert abs(mine - theirs) < 4 * np.sqrt(80 * 0.25)

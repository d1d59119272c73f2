"""The n-gram model beside a plain one over dictionaries; both judges on texts whose kind is known."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from luban.core.errors import ArtifactError, ConfigError, DataError
from luban.corpus.document import Document
from luban.corpus.quality import ngram
from luban.corpus.quality.linear import LinearModel
from luban.corpus.quality.ngram import NgramModel
from luban.corpus.steps import identity, make_step
from luban.corpus.tally import Tally
from luban.corpus.words import FORMAT


class Plain:
    """Witten-Bell over tuples and dictionaries."""

    def __init__(self, texts):
        self.counts, self.after = Counter(), defaultdict(Counter)
        for text in texts:
            found = text.split()
            for n in (1, 2, 3):
                for i in range(len(found) - n + 1):
                    self.after[tuple(found[i : i + n - 1])][found[i + n - 1]] += 1
        self.vocabulary = len(self.after[()]) + 1

    def probability(self, word, context):
        below = self.probability(word, context[1:]) if context else 1 / self.vocabulary
        seen = self.after.get(context)
        if not seen:
            return below
        return (seen[word] + len(seen) * below) / (seen.total() + len(seen))


def test_probabilities_are_those_of_plain_counting(monkeypatch):
    monkeypatch.setattr(ngram, "HELD", 200)  # so that tables are merged many times
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(30)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 60), weights=range(1, 31))) for _ in range(60)]
    model, plain = NgramModel.train(texts), Plain(texts)
    assert model.vocabulary == plain.vocabulary
    for _ in range(50):
        found = rng.choices([*vocabulary, "unseen", "other"], k=20)
        expected = [math.log(plain.probability(w, tuple(found[max(i - 2, 0) : i]))) for i, w in enumerate(found)]
        np.testing.assert_allclose(model.log_probabilities(" ".join(found)), expected, rtol=1e-12)
    for context in (("",), (vocabulary[3],), (vocabulary[3], vocabulary[5])):
        known = {w for t in texts for w in t.split()}
        assert sum(plain.probability(w, context) for w in known) + plain.probability(
            "unseen", context
        ) == pytest.approx(1)


def english(rng: random.Random, count: int = 60) -> str:
    subject, verb = ["the council", "a farmer", "our teacher", "the old king"], ["wrote", "found", "praised", "sold"]
    thing = ["a long letter", "the green field", "his first book", "some water"]
    return " and ".join(" ".join(map(rng.choice, (subject, verb, thing))) for _ in range(count // 6))


def spam(rng: random.Random, count: int = 60) -> str:
    return " ".join(
        rng.choices(
            ["buy", "cheap", "now", "click", "here", "the", "offer", "best", "price", "free", "win", "a", "letter"],
            k=count,
        )
    )


def test_a_model_is_kept_and_its_step_drops_what_it_finds_strange(tmp_path):
    rng = random.Random(2)
    NgramModel.train(english(rng) for _ in range(100)).save(tmp_path / "m")
    documents = [
        Document(id=f"{kind.__name__}{i}", text=kind(rng), source="s") for i in range(40) for kind in (english, spam)
    ]
    scored = list(make_step(f"perplexity={tmp_path / 'm'}")(documents, Tally()))
    good = [d.meta["perplexity"] for d in scored if d.id.startswith("english")]
    bad = [d.meta["perplexity"] for d in scored if d.id.startswith("spam")]
    assert max(good) < min(bad) / 3
    tally = Tally()
    kept = list(make_step(f"perplexity={tmp_path / 'm'}@{max(good) + 1}")(documents, tally))
    assert {d.id for d in kept} == {d.id for d in documents if d.id.startswith("english")}
    assert tally.dropped["perplexity"]["documents"] == 40
    assert str(tmp_path) not in json.dumps(identity(f"perplexity={tmp_path / 'm'}"))


def test_the_classifier_tells_kinds_apart_and_comes_out_the_same(tmp_path):
    rng = random.Random(3)
    good, other = [english(rng) for _ in range(150)], [spam(rng) for _ in range(50)]
    model = LinearModel.train(good, other)
    again = LinearModel.train(good, other)
    assert (model.weights == again.weights).all() and model.bias == again.bias
    model.save(tmp_path / "m")
    documents = [
        Document(id=f"{kind.__name__}{i}", text=kind(rng), source="s") for i in range(60) for kind in (english, spam)
    ]
    kept = list(make_step(f"classifier={tmp_path / 'm'}@0.5")(documents, Tally()))
    right = {d.id for d in documents if d.id.startswith("english")}
    precision, recall = len({d.id for d in kept} & right) / len(kept), len({d.id for d in kept} & right) / len(right)
    print(f"classifier: precision {precision:.3f}, recall {recall:.3f}")
    assert precision > 0.98 and recall > 0.98
    assert all(d.quality >= 0.5 for d in kept) and model.score("") == 0.0


def test_a_model_of_other_hashes_is_refused(tmp_path, monkeypatch):
    NgramModel.train(["one two three"]).save(tmp_path / "n")
    monkeypatch.setattr("luban.corpus.words.FORMAT", FORMAT + 1)
    with pytest.raises(ArtifactError, match="hashed in another way"):
        NgramModel.load(tmp_path / "n")


def test_wrong_models_and_limits_are_refused(tmp_path):
    with pytest.raises(DataError, match="no word"):
        NgramModel.train(["", "..."])
    with pytest.raises(DataError, match="both kinds"):
        LinearModel.train(["good text"], [""])
    with pytest.raises(ArtifactError, match="does not exist"):
        make_step(f"perplexity={tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="MODEL@NUMBER"):
        make_step("classifier=m@high")

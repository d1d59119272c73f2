"""The altered sentence: what is replaced by what, surprises against the whole log-softmax, ranks by a model that is known."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import write_checkpoint

from luban.core.errors import DataError, UnsupportedError
from luban.evals import altered_sentence
from luban.evals.altered_sentence import AlteredSentence, altered, marked, sentence_means, sentences_of, surprises
from luban.evals.task import Material
from luban.load.model import load_model
from luban.models.recurrent import RecurrentBody
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped


def book(seed: int, sentences: int = 30) -> str:
    rng = random.Random(seed)
    words = [f"{chr(97 + seed)}{i}" for i in range(20)]
    return " ".join(" ".join(rng.choices(words, k=rng.randint(6, 9))) + "." for _ in range(sentences))


class Text:
    def __init__(self, text, meta=None):
        self.text, self.meta, self.id = text, meta, "a"


@pytest.fixture
def model(tmp_path):
    spec = uniform(vocab_size=272, width=16, layers=1, context=1200, mixer=Grouped(heads=2))
    return load_model(str(write_checkpoint(tmp_path / "model", spec)))


def test_a_late_sentence_is_replaced_by_one_of_the_other_book_and_nothing_else():
    text, other = book(0), book(1)
    found = altered(text, other, random.randrange(100))
    begin, end = found.sentences[found.changed]
    assert found.text[begin:end].strip() in other and found.original in text and begin > len(text) / 2
    assert found.text[:begin] == text[:begin] and found.text[end:] == text[begin + len(found.original) :]
    assert [found.text[a:b] for a, b in found.sentences] == [found.text[a:b] for a, b in sentences_of(found.text)]
    assert "".join(text[a:b] for a, b in sentences_of(text)) == text
    assert altered(text, "Short.", 0) is None


def test_a_document_may_say_what_is_replaced_by_what(model):
    text = book(0, 20)
    begin, end = sentences_of(text)[13]
    named = {"altered": {"start": begin, "stop": begin + len(text[begin:end].rstrip()), "text": "Something else. "}}
    found = marked(Text(text, named))
    assert found.text == text[:begin] + "Something else. " + text[end:] and found.original == text[begin:end]
    assert found.changed == 13 and len(found.sentences) == 20
    assert marked(Text(text)) is None and marked(Text(text, {"title": "x"})) is None
    read = AlteredSentence().run(model, Material(text=[Text(text, named)]), limit=0, precision="float32")  # type: ignore[list-item]
    assert [row["changed"] for row in read.items] == [13]
    named["altered"]["stop"] += 1
    with pytest.raises(DataError, match=f"document a: no sentence begins at character {begin} and ends at"):
        marked(Text(text, named))
    with pytest.raises(DataError, match="needs 'start', 'stop' and 'text'"):
        marked(Text(text, {"altered": {"start": 0}}))


def test_surprises_are_the_negative_log_probabilities(model):
    ids = [random.randrange(272) for _ in range(40)]
    with torch.no_grad():
        wanted = -model.module(torch.tensor([ids]))[0].log_softmax(-1)[torch.arange(39), ids[1:]]
    torch.testing.assert_close(torch.tensor(surprises(model, ids, 1200)), wanted, atol=1e-4, rtol=1e-4)
    windowed = surprises(model, ids, 8)
    assert len(windowed) == 39 and windowed[:8] == pytest.approx(wanted[:8].tolist(), abs=1e-4)
    with torch.no_grad():  # the last token: windows begin every 4 tokens
        begin = max(start for start in range(0, 39, 4) if start + 8 - 4 < 39)
        last = -model.module(torch.tensor([ids[begin:39]]))[0, -1].log_softmax(-1)[ids[39]]
    assert windowed[-1] == pytest.approx(float(last), abs=1e-4)


def test_means_are_those_of_the_sentences_tokens():
    ranges = [(i, i + 1) for i in range(15)]
    assert sentence_means([1.0] * 6 + [3.0] * 7 + [9.0] * 2, ranges, [(0, 6), (6, 13), (13, 15)]) == [
        1,
        3,
        float("-inf"),
    ]


def test_what_only_the_whole_book_tells_is_ranked_first_in_view_of_it(model, monkeypatch):
    """A reader that knows the words of the book when it sees all of it, and nothing with a window."""

    def known(model, ids, context):
        text = model.tokenizer.decode(ids[1:])
        foreign = [i for i, letter in enumerate(text) if letter.isalpha() and letter != text[0]]
        return [float(i in foreign) if context == 1200 else float(i % 7) for i in range(len(ids) - 1)]

    monkeypatch.setattr(altered_sentence, "surprises", known)
    material = Material(text=[Text(book(seed, 20)) for seed in range(4)])  # type: ignore[list-item]
    found = AlteredSentence().run(model, material, limit=3, precision="float32")
    assert found.figures["altered_whole_first"] == 1.0 and found.figures["altered_window_rank"] > 1
    assert len(found.items) == 3 and all(row["seconds"] >= 0 and row["tokens"] <= 1200 for row in found.items)


def test_it_runs_on_a_model_and_refuses_what_it_cannot_use(model, tmp_path):
    material = Material(text=[Text(book(seed, 12)) for seed in range(2)])  # type: ignore[list-item]
    found = AlteredSentence().run(model, material, limit=1, precision="float32")
    assert 1 <= found.figures["altered_whole_rank"] <= 12
    with pytest.raises(DataError, match="two held-out documents or more, 1 found"):
        AlteredSentence().run(model, Material(text=material.text[:1]), limit=1, precision="float32")
    with pytest.raises(DataError, match="give longer texts"):
        AlteredSentence().run(model, Material(text=[Text("Ab."), Text("Cd.")]), limit=1, precision="float32")  # type: ignore[list-item]
    encoder = uniform(vocab_size=272, width=16, body=RecurrentBody(), head=altered_head())
    other = load_model(str(write_checkpoint(tmp_path / "other", encoder)))
    with pytest.raises(UnsupportedError, match="altered_sentence needs a decoder"):
        AlteredSentence().run(other, material, limit=1, precision="float32")


def altered_head():
    from luban.models.head.rows import Classes

    return Classes(count=2, pooling="last", dense=False)

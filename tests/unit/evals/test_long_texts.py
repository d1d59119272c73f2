"""Facts in long texts and what a model makes of its context: rows, scores by models that are known, the pictures."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
from tiny_models import write_checkpoint

from luban.cli.main import main
from luban.core.errors import DataError
from luban.evals import needle
from luban.evals.context_length import ContextLength, position_ranges
from luban.evals.needle import Needle, lengths_of, likeliest, row_of
from luban.evals.task import Material
from luban.load.model import load_model
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped
from luban.report.long_context import heat_map


class Text:
    def __init__(self, text):
        self.text = text


def prose(seed: int, sentences: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join(" ".join(f"w{rng.randrange(99)}" for _ in range(rng.randint(5, 9))) + "." for _ in range(sentences))


@pytest.fixture
def model(tmp_path):
    spec = uniform(vocab_size=272, width=16, layers=1, context=512, mixer=Grouped(heads=2))
    return load_model(str(write_checkpoint(tmp_path / "model", spec)))


@pytest.mark.parametrize("depth", needle.DEPTHS)
def test_a_row_has_the_fact_once_at_its_depth_and_asks_at_the_end(model, depth):
    ids, answer = row_of(model, prose(1), 512, depth, "Riga", 70_421)
    text = model.tokenizer.decode(ids)
    assert 440 <= len(ids) <= 512 and model.tokenizer.decode(ids[-answer:]) == " 70421"
    assert text.count("70421") == 2 and text.endswith("The secret number of Riga is 70421")
    place = text.index("The secret number of Riga is 70421.")
    asked = 2 * len(" The secret number of Riga is 70421.")  # the fact and the question aren't haystack
    assert place / (len(text) - asked) == pytest.approx(depth, abs=0.1)
    assert place == 1 or text[:place].rstrip().endswith(".")
    with pytest.raises(DataError, match="a row of 512 tokens needs"):
        row_of(model, prose(1, 3), 512, depth, "Riga", 70_421)


def test_an_answer_is_found_where_every_token_is_the_likeliest(model):
    ids = [random.randrange(20, 270) for _ in range(30)]
    with torch.no_grad():
        logits = model.module(torch.tensor([ids[:-1]]))[0]
    wanted = logits.log_softmax(-1)[torch.arange(26, 29), ids[27:]]
    found, logprob = likeliest(model, ids, 3, "float32")
    assert logprob == pytest.approx(float(wanted.sum()), rel=3e-6, abs=1e-4) and not found
    ids[-1] = int(logits[-1].argmax())
    assert likeliest(model, ids, 1, "float32")[0]


def test_a_model_that_copies_finds_facts_up_to_its_reach(model, monkeypatch):
    """A stand-in that sees the last 200 tokens answers rightly where the fact is among them."""

    def stand_in(_model, ids, count, _precision):
        text = model.tokenizer.decode(ids[-200:-count])
        return model.tokenizer.decode(ids[-count:]).strip() in text, 0.0

    monkeypatch.setattr(needle, "likeliest", stand_in)
    found = Needle().run(model, Material(text=[Text(prose(i, 200)) for i in range(3)]), limit=2, precision="float32")  # type: ignore[list-item]
    assert lengths_of(512) == [128, 256, 512] and len(found.items) == 3 * 5 * 2
    assert found.figures["needle_128"] == 1.0 and 0 < found.figures["needle_512"] < 0.5
    by_depth = {row["depth"]: row["found"] for row in found.items if row["length"] == 512}
    assert by_depth[1.0] and not by_depth[0.0]
    svg = heat_map(found.items)
    assert svg.count("<rect") == 15 and "512 tokens, depth 0%: 0 of 2" in svg and "128 tokens, depth 0%: 2 of 2" in svg


def test_ranges_cover_every_position_once():
    for context in (10, 16, 500, 512, 1000):
        places = [place for begin, end in position_ranges(context) for place in range(begin, end)]
        assert places == list(range(context))


def test_losses_by_position_are_the_models(model):
    text = prose(2, 300)
    found = ContextLength().run(model, Material(text=[Text(text)]), limit=2, precision="float32")  # type: ignore[list-item]
    ids = model.tokenizer.encode(text, bos=True)
    with torch.no_grad():
        rows = torch.tensor([ids[:512], ids[512:1024]])
        targets = torch.tensor([ids[1:513], ids[513:1025]])
        losses = -model.module(rows).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for begin, end in position_ranges(512):
        assert found.figures[f"loss_to_{end}"] == pytest.approx(float(losses[:, begin:end].mean()), abs=1e-4)
    timed = [row for row in found.items if "seconds" in row]
    assert [row["length"] for row in timed] == [128, 256, 512] and all(row["seconds"] > 0 for row in timed)
    with pytest.raises(DataError, match="needs 513 tokens of held-out text"):
        ContextLength().run(model, Material(text=[Text("short")]), limit=0, precision="float32")  # type: ignore[list-item]


def test_from_the_command_line_to_the_page(model, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(prose(i, 300))
    corpus = str(tmp_path / "corpus")
    assert not main(["corpus", "build", str(tmp_path / "text"), "--out", corpus, "--heldout", "0.5"])
    command = ["eval", str(tmp_path / "model"), "needle", "context_length", "--corpus", corpus, "--limit", "1"]
    assert not main([*command, "--out", str(tmp_path / "eval"), "--device", "cpu"])
    figures = json.loads((tmp_path / "eval" / "figures.json").read_text())
    assert 0 <= figures["needle_accuracy"] <= 1 and figures["loss_to_512"] == pytest.approx(math.log(272), rel=0.1)
    assert not main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "Facts found by length and depth" in page and "Loss by position" in page
    assert len(re.findall(r"tokens, depth", page)) == 15

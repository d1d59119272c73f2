"""Answers from an index in the chat page: the passages that they cite, as cards, in a real browser."""

from __future__ import annotations

import json

import pytest
import torch
import warm
from browser import CHROMIUM, DRIVER
from safetensors.torch import save_file
from test_http import start, stop
from tiny_models import write_byte_tokenizer

import luban
from luban.models.spec import uniform, write_spec
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.learned import Learned
from luban.tokenizer.chat import render

pytest.importorskip("fastapi")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

ENTER = "\ue007"
ANSWER = "blue [1]"


def write_parrot(folder):
    """A model that answers everything with `ANSWER`: the last token alone decides the next one."""
    write_byte_tokenizer(folder / "tokenizer")
    tokenizer = luban.load_tokenizer(folder / "tokenizer")
    spec = uniform(
        vocab_size=272,
        width=64,
        layers=1,
        context=512,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=32),
        position=Learned(),
        tied_head=False,
    )
    model = luban.build_model(spec, seed=0)
    prompt = render([{"role": "user", "content": "x"}], tokenizer, add_generation_prompt=True).token_ids
    ids = [prompt[-1], *tokenizer.encode(ANSWER), tokenizer.stop_ids[-1]]
    assert len(set(ids)) == len(ids)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name.endswith(("o.weight", "down.weight")) or "position" in name:
                weight.zero_()
        directions = torch.eye(64)[: len(ids)]
        embedding = next(w for n, w in weights.items() if "embedding" in n and w.shape[0] == 272)
        head = weights["head.weight"]
        embedding.zero_(), head.zero_()
        embedding[:, -1] = 1.0
        for before, after, direction in zip(ids, ids[1:], directions, strict=False):
            embedding[before] = direction
            head[after] = 50 * direction
    write_spec(spec, folder)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    rows = [
        {"id": "colours", "text": "The sea is blue <b>and wide</b>.", "title": "Sea"},
        {"id": "trees", "text": "Leaves are green.", "title": "Leaves"},
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = warm.command("rag", "index", folder / "texts.jsonl", "--encoder", "bm25", "--out", folder / "index")
    assert done.returncode == 0, done.stderr
    process, address, _ = start(write_parrot(folder / "parrot"), "--port", "0", "--index", folder / "index")
    yield address
    stop(process)


def test_the_cited_passage_is_a_card_that_opens_on_its_text(browser, served):
    browser.open(served)
    browser.until("state.model")
    browser.type("#input", "Which colour has the sea?" + ENTER)
    browser.until("document.querySelectorAll('.message.assistant .tools').length == 1")
    shown = "document.querySelector('.message.assistant .text').textContent"
    assert browser.script(shown) == ANSWER
    cards = browser.script("[...document.querySelectorAll('.message.assistant details')].map(d => d.textContent)")
    assert len(cards) == 1 and "Sea" in cards[0] and "<b>and wide</b>" in cards[0]  # the text stays text
    assert browser.script("document.querySelectorAll('.message b').length") == 0
    assert not browser.script("document.querySelector('details').open")
    browser.click(".message.assistant details summary")
    assert browser.script("document.querySelector('details').open")
    browser.open(served)  # a reload keeps the cards
    browser.until("document.querySelectorAll('.message.assistant details').length == 1")
    assert [line for line in browser.log() if "favicon" not in line] == []

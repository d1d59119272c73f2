"""Models of `luban rag train` behind the HTTP API: their answers are those of `luban rag ask`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient
from http_requests import LOCAL
from rag_models import write_facts

import luban
from luban.cli.main import main
from luban.retrieval.index import Index
from luban.retrieval.rag.asking import RagAsker
from luban.retrieval.rag.model import load_rag
from luban.retrieval.rag.train import train_rag
from luban.serve.api.app import ServerOptions, create_app

QUESTION = "what is tin?"


@pytest.fixture(scope="module", params=["sequence, decoder", "token, encoder-decoder"])
def served(request, tmp_path_factory):
    """(client, asker, folder)."""
    marginal, generator = request.param.split(", ")
    folder = tmp_path_factory.mktemp("served")
    recipe = write_facts(folder, two_sided=generator == "encoder-decoder")
    train_rag(replace(recipe, marginal=marginal), folder / "rag")
    rag = load_rag(folder / "rag")
    asker = RagAsker(Index(folder / "index"), rag, max_tokens=8)
    app = create_app(luban.Engine(rag.generator.model), ServerOptions(answerer=asker, max_queue=0))
    with TestClient(app, base_url=LOCAL) as client:
        yield client, asker, folder


def ask(client, *messages, **fields):
    return client.post("/v1/chat/completions", json={"messages": list(messages), **fields})


def user(text):
    return {"role": "user", "content": text}


def test_an_answer_is_that_of_the_asker(served):
    client, asker, _ = served
    right = asker.answer(QUESTION)
    response = ask(client, user("hello"), {"role": "assistant", "content": "yes"}, user(QUESTION), temperature=0.3)
    answer = response.json()
    assert answer["choices"][0]["message"]["content"] == right.text
    assert answer["choices"][0]["finish_reason"] == ("stop" if right.ended else "length")
    assert answer["citations"] == right.citations("") and answer["citations"][0]["source"].startswith("texts.jsonl")
    assert response.headers["luban-messages-left-out"] == "2"
    counts = {"prompt_tokens": len(right.prompt_token_ids), "completion_tokens": len(right.token_ids)}
    assert counts.items() <= answer["usage"].items()
    assert client.get("/v1/models").json()["data"][0]["chat"]


def test_a_stream_is_the_same_answer(served):
    client, asker, _ = served
    lines = ask(client, user(QUESTION), stream=True, max_tokens=3).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    right = asker.answer(QUESTION, 3)
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == right.text
    assert events[-1]["citations"] == right.citations("") and events[-1]["choices"][0]["finish_reason"]
    assert len(right.token_ids) <= 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "'n' is not supported"),
        ({"logprobs": True}, "'logprobs' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "the last message must be a user's"),
        ({"messages": [user("why? " * 60)]}, "leaves"),
    ],
)
def test_what_would_be_ignored_is_refused(served, fields, words):
    client, _, _ = served
    refused = client.post("/v1/chat/completions", json={"messages": [user(QUESTION)], **fields})
    assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_the_generator_goes_on_serving_what_it_writes_alone(served):
    client, _, _ = served
    answer = client.post("/v1/completions", json={"prompt": "tin", "max_tokens": 2, "temperature": 0}).json()
    assert answer["usage"]["completion_tokens"] <= 2 and "citations" not in answer


def test_the_command_refuses_what_it_could_not_keep(served, tmp_path, capsys):
    _, _, folder = served
    for words, said in (
        ((), f"name one by --index, or serve {folder / 'rag'}/generator"),
        (("--index", folder / "index", "--rerank", folder), "--rerank: a model of rag train"),
        (("--index", folder / "index", "--adapter", folder), "--adapter: a model of rag train"),
        (("--index", folder / "index", "--plan.tensor", 2), "--plan.tensor: a model of rag train"),
        (("--index", folder / "index", "--passages", 0), "--passages must be at least 1"),
    ):
        assert main(["serve", str(folder / "rag"), *map(str, words)]) in (1, 2)
        assert said in capsys.readouterr().err
    assert (
        main(["rag", "index", str(folder / "texts.jsonl"), "--encoder", "bm25", "--out", str(tmp_path / "words")]) == 0
    )
    for flag in ("--passages=3", "--rerank=DIR"):  # without an index they mean nothing
        assert main(["serve", str(folder / "rag" / "generator"), flag]) == 2
        assert "does nothing without --index" in capsys.readouterr().err
    assert main(["serve", str(folder / "rag"), "--index", str(tmp_path / "words")]) in (1, 2)
    assert "has no vectors: build the index with that encoder" in capsys.readouterr().err

"""A server with an index: passages before the question, citations beside OpenAI's fields."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient
from http_requests import ASK, LOCAL

from luban.serve.api.app import ServerOptions, create_app

ROW = {"mark": 1, "score": 1.0, "title": "T", "text": "some text", "source": "a.md", "start": 0, "stop": 9}


@dataclass
class Grounded:
    messages: list
    shown: int
    grammar: str | None = None

    def citations(self, answer):
        return [{**ROW, "mark": mark + 1} for mark in range(self.shown)]


class FakeRetriever:
    """Puts as many copies of a passage before the question as fit."""

    def __init__(self, passage="p" * 100, grammar=None):
        self.passage, self.grammar, self.grounded = passage, grammar, []

    def ground(self, messages, fits):
        for count in (9, 3, 1, 0):
            made = [*messages[:-1], {**messages[-1], "content": self.passage * count + messages[-1]["content"]}]
            if fits(made):
                break
        self.grounded.append(made)
        return Grounded(made, count, self.grammar)


@pytest.fixture(scope="module")
def served(engine):
    retriever = FakeRetriever()
    with TestClient(create_app(engine, ServerOptions(retriever=retriever)), base_url=LOCAL) as client:
        yield client, retriever


def test_an_answer_has_citations_and_its_prompt_the_passages_that_fit(served):
    client, retriever = served
    answer = client.post("/v1/chat/completions", json=ASK).json()
    assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["role"] == "assistant"
    assert [row["mark"] for row in answer["citations"]] == [1, 2, 3]  # nine don't fit 512 tokens
    assert 300 < answer["usage"]["prompt_tokens"] < 512 - 3
    assert retriever.grounded[-1][-1]["content"].endswith("ppphi")


def test_the_last_chunk_of_a_stream_has_the_citations(served):
    client, _ = served
    text = client.post("/v1/chat/completions", json={**ASK, "stream": True, "n": 2, "temperature": 1}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    cited = [event for event in events if "citations" in event]
    assert cited == [event for event in events if event["choices"] and event["choices"][0]["finish_reason"]][-1:]
    assert cited[0]["citations"][0] == ROW


def test_answers_that_must_quote_are_words_of_a_passage(engine):
    """A random model's answers, whole and in a stream; a request that wants another form is refused."""
    retriever = FakeRetriever(grammar='start: %regex { "substring_words": "the fox saw a hen and its egg" }')
    with TestClient(create_app(engine, ServerOptions(retriever=retriever)), base_url=LOCAL) as client:
        asked = {**ASK, "max_tokens": 20, "temperature": 1}
        texts = [client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]]
        stream = client.post("/v1/chat/completions", json={**asked, "stream": True}).text
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        texts.append("".join(each["choices"][0]["delta"].get("content") or "" for each in events if each["choices"]))
        form = {"response_format": {"type": "json_object"}}
        refused = client.post("/v1/chat/completions", json={**ASK, **form})
    assert all(text and text in "the fox saw a hen and its egg" for text in texts), texts
    assert refused.status_code == 400 and "--quote" in refused.json()["error"]["message"]


def test_without_an_index_there_are_none_and_tools_results_are_not_searched(client, served):
    assert "citations" not in client.post("/v1/chat/completions", json=ASK).json()
    with_index, retriever = served
    before = len(retriever.grounded)
    messages = [*ASK["messages"], {"role": "assistant", "content": "yes"}]
    answer = with_index.post("/v1/chat/completions", json={**ASK, "messages": messages}).json()
    assert "citations" not in answer and len(retriever.grounded) == before


def test_a_retriever_that_refuses_is_a_refused_request(engine):
    from luban.core.errors import DataError

    class Refuses:
        def ground(self, messages, fits):
            raise DataError("an index answers questions")

    with TestClient(create_app(engine, ServerOptions(retriever=Refuses())), base_url=LOCAL) as client:
        refused = client.post("/v1/chat/completions", json=ASK)
    assert refused.status_code == 400 and "an index answers questions" in refused.json()["error"]["message"]

"""Random bodies at every route: whatever is sent, the server answers, and never with its own fault."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient

import luban
from luban.serve.api.app import create_app
from luban.serve.api.chat_body import ChatBody
from luban.serve.api.completion_body import CompletionBody
from luban.serve.api.service import EmbeddingBody
from luban.serve.api.token_routes import DetokenizeBody, TokenizeBody

MESSAGE = {"role": "user", "content": "hi"}
ROUTES = {
    "/v1/chat/completions": (ChatBody, {"messages": [MESSAGE], "max_tokens": 3}),
    "/v1/completions": (CompletionBody, {"prompt": "ab", "max_tokens": 3}),
    "/v1/embeddings": (EmbeddingBody, {"input": ["a"]}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [30]}),
}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    17,
    2**31,
    -(2**70),
    0.0,
    0.5,
    -0.1,
    1e300,
    "",
    "a",
    "json_object",
    "required",
    "auto",
    "é\u0000🐉",
    [],
    [0],
    ["a", ""],
    [[1, 2], "b"],
    {},
    {"a": 1},
    {"5": 3, "70": -100},
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"$ref": "#"}}}},
    {"regex": "a{1000000}"},
    {"regex": "(a*)*b"},
    {"grammar": "start: start"},
    {"choice": ["x", "x"]},
    {"json": False},
    {"json": {"not": {}}},
    [MESSAGE, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_call_id": "9"}],
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    {"type": "function", "function": {"name": "f"}},
    {"include_usage": True},
    {"messages": 3, "tools": "x"},
]


@pytest.fixture(scope="module")
def client(tiny_checkpoint):
    app = create_app(luban.Engine(luban.load_model(tiny_checkpoint), cache_bytes=600 * 256))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("route", ROUTES)
def test_no_body_is_a_fault_of_the_server(client, route):
    kind, valid = ROUTES[route]
    seed = random.randrange(2**32)
    rng, names = random.Random(seed), [*kind.model_fields, "suffix", "unknown"]
    for _ in range(60):
        body = {**valid, **{rng.choice(names): rng.choice(VALUES) for _ in range(rng.choice([1, 1, 2, 4]))}}
        if isinstance(body.get("max_tokens"), int):
            body["max_tokens"] = min(body["max_tokens"], 4)
        answer = client.post(route, json=body)
        assert answer.status_code < 500, (seed, body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (seed, body)
    assert client.post(route, json=valid).status_code == client.get("/health").status_code == 200

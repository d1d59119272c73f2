"""schemathesis over the OpenAPI description: whatever its schemas allow or forbid, no answer is a fault of the server."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")
pytest.importorskip("schemathesis")

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NotSet

import luban
from luban.serve.api.app import ServerOptions, create_app

REQUESTS = 10_000  # of the slow test, over all routes
JSON = {"Content-Type": "application/json"}
MOST_TOKENS = 3  # of an answer, so that requests stay short


@pytest.fixture(scope="module")
def client(tiny_checkpoint):
    engine = luban.Engine(luban.load_model(tiny_checkpoint), cache_bytes=600 * 256, more_adapters=True)
    app = create_app(engine, ServerOptions(more_adapters=True))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def shortened(body):
    """A body whose answer is short, where it is one that asks for an answer."""
    if isinstance(body, dict) and ("messages" in body or "prompt" in body):
        asked = body.get("max_tokens")
        body = {**body, "max_tokens": min(asked, MOST_TOKENS) if type(asked) is int else body.get("max_tokens", 1)}
        if type(body.get("max_completion_tokens")) is int:
            body["max_completion_tokens"] = min(body["max_completion_tokens"], MOST_TOKENS)
    return body


def run(client: TestClient, examples: int) -> int:
    """Random requests, so many for every operation; returns how many were sent."""
    operations = [found.ok() for found in schemathesis.openapi.from_dict(client.app.openapi()).get_all_operations()]
    sent = 0
    for operation in operations:
        modes = [operation.as_strategy(generation_mode=mode) for mode in GenerationMode]

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=st.one_of(modes))
        def ask(case):
            nonlocal sent
            content = case.body if isinstance(case.body, bytes) else json.dumps(shortened(case.body), default=repr)
            content = b"" if isinstance(case.body, NotSet) else content
            path, query = case.formatted_path, case.query or None
            answer = client.request(case.method, path, params=query, headers=JSON, content=content)
            assert answer.status_code < 500, (case.method, path, content, answer.text)
            sent += 1

        ask()
    assert client.get("/health").status_code == 200 and len(operations) >= 8
    return sent


def test_a_few_requests_of_every_route(client):
    assert run(client, 8) >= 30


@pytest.mark.slow
def test_ten_thousand_requests(client):
    assert run(client, REQUESTS // 7 + 1) >= REQUESTS  # seven routes take bodies; the others have few forms

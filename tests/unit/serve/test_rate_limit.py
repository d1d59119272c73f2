"""Requests beyond a client's rate are answered 429, and come through when Retry-After says."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from luban.serve.api import rate_limit
from luban.serve.api.rate_limit import RateLimit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def client(clock):
    app = FastAPI()
    app.post("/v1/completions")(lambda: {})
    app.get("/health")(lambda: {})
    app.add_middleware(RateLimit, per_minute=3, clock=clock)
    with TestClient(app) as client:
        yield client


def ask(client, key: str | None = "a"):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.post("/v1/completions", headers=headers)


def test_a_client_gets_its_requests_back_evenly(client, clock):
    assert [ask(client).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = ask(client)
    assert refused.headers["Retry-After"] == "20" and refused.json()["error"]["code"] == "rate_limit_exceeded"
    clock.now = 15.0
    assert ask(client).headers["Retry-After"] == "5"
    clock.now = 20.0
    assert [ask(client).status_code for _ in range(2)] == [200, 429]
    clock.now = 1000.0
    assert [ask(client).status_code for _ in range(4)] == [200, 200, 200, 429]


def test_clients_are_told_apart_by_key_and_address(client):
    assert [ask(client, "a").status_code for _ in range(4)][-1] == 429
    assert ask(client, "b").status_code == 200
    assert [ask(client, None).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert all(client.get("/health").status_code == 200 for _ in range(9))


def test_clients_that_are_long_silent_are_forgotten(client, monkeypatch):
    monkeypatch.setattr(rate_limit, "MAX_CLIENTS", 2)
    assert [ask(client, "a").status_code for _ in range(4)][-1] == 429
    ask(client, "b"), ask(client, "c")
    assert ask(client, "a").status_code == 200

"""A random model of bytes, its engine, and a client of the application around it."""

from __future__ import annotations

import pytest
from http_requests import LOCAL

import luban


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def engine(model):
    return luban.Engine(model)


@pytest.fixture(scope="module")
def client(engine):
    from fastapi.testclient import TestClient

    from luban.serve.api.app import create_app

    with TestClient(create_app(engine), base_url=LOCAL) as client:
        yield client

"""NaN and infinity: logits from which no token can be chosen, and log-probabilities that JSON can't hold."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient
from http_requests import LOCAL

import luban
from luban import Sampling
from luban.generate.session import NotFiniteError, Sequence, TokenLogprob, choose
from luban.serve.api.answer import Shape
from luban.serve.api.app import create_app
from luban.serve.engine import Request


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(params=[True, False], ids=["paged", "contiguous"])
def engine(model, request):
    return luban.Engine(model, paged=request.param)


@pytest.fixture
def client(engine):
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        yield client


@contextmanager
def damaged(model, token: int, value: float):
    """The model with this number in the embedding of one token, which spoils the logits of rows that hold it alone."""
    table = model.module.decoder.embedding.tokens.weight
    saved = table.detach().clone()
    with torch.no_grad():
        table[token] = value
        try:
            yield
        finally:
            table.copy_(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_request_and_no_other(model, engine, value, temperature):
    spoiled = model.spec.vocab_size - 1
    sampling = Sampling(max_tokens=4, temperature=temperature, seed=3, ignore_eos=True, n=2, logprobs=2)
    prompts = [[5, 6], [5, spoiled], [7]]
    expected = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    with damaged(model, spoiled, value):
        requests = [Request(prompt, sampling) for prompt in prompts]
        for request in requests:
            engine.submit(request)
        while engine.step():
            pass
        with pytest.raises(NotFiniteError, match="logits are NaN or infinite"):
            engine.generate([[5, spoiled]], sampling)
        with pytest.raises(NotFiniteError):
            list(engine.stream([5, spoiled], sampling))
    assert isinstance(requests[1].error, NotFiniteError) and requests[1].done
    for request, result in zip(requests[::2], expected[::2], strict=True):
        assert request.error is None
        if spoiled not in result.choices[0].token_ids + result.choices[1].token_ids:
            assert [c.token_ids for c in request.result.choices] == [c.token_ids for c in result.choices]
    assert not engine.running and not engine.batch.sequences


def test_a_single_finite_logit_is_enough():
    """Encoder–decoders force their first token so."""
    logits_BV = torch.full((1, 20), float("-inf"))
    logits_BV[0, 9] = 0.0
    sequence = Sequence([5], Sampling(max_tokens=1, temperature=0, logprobs=3), seed=0)
    assert choose(logits_BV, [sequence], lambda s: s.prompt) == [9]
    assert [(entry.token, entry.logprob) for entry in sequence.logprobs] == [(9, 0.0)]


def test_impossible_tokens_have_log_probabilities_that_json_can_hold(engine):
    shape = Shape(chat=True, model="m", tokenizer=engine.model.tokenizer)
    entry = TokenLogprob(5, 0.0, [(5, 0.0), (6, -math.inf)])
    (content,) = shape.logprobs(0, [entry])["content"]
    assert [top["logprob"] for top in content["top_logprobs"]] == [0.0, -9999.0]
    plain = Shape(chat=False, model="m", tokenizer=engine.model.tokenizer)
    found = plain.logprobs(0, [entry, TokenLogprob(6, -math.inf, [])])
    assert found["token_logprobs"] == [0.0, -9999.0] and sorted(found["top_logprobs"][0].values()) == [-9999.0, 0.0]


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_are_an_error_and_no_text(engine, client, stream):
    with damaged(engine.model, 7, math.nan):
        answer = client.post("/v1/completions", json={"prompt": [7], "stream": stream, "logprobs": 2})
    if stream:
        (event,) = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
        assert "NaN or infinite" in event["error"]["message"] and "[DONE]" not in answer.text
    else:
        assert answer.status_code == 500 and "NaN or infinite" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": [8]}).status_code == 200


def test_a_fault_of_the_server_is_answered_in_the_same_shape(engine, monkeypatch):
    monkeypatch.setattr(Shape, "body", lambda *_, **__: {"broken": math.nan})
    with TestClient(create_app(engine), base_url=LOCAL, raise_server_exceptions=False) as failing:
        answer = failing.post("/v1/completions", json={"prompt": [8]})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"

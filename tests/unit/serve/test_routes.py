"""Routes beside the two that generate, and what stands before all of them."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient
from http_requests import ASK, LOCAL
from tiny_models import write_checkpoint

import luban
from luban.serve.api import service as service_module
from luban.serve.api.app import create_app


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from luban.models.encoder import EncoderBody
    from luban.models.head.hidden import Hidden
    from luban.models.spec import uniform
    from luban.nn.feedforward.gated import SwiGLU
    from luban.nn.mixer.grouped import Grouped

    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=64,
        mixer=Grouped(heads=4),
        feedforward=SwiGLU(width=48),
        body=EncoderBody(),
        head=Hidden(),
    )
    return luban.load_model(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-encoder", spec))


# Tokens ---------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize(client, model):
    tokenizer = model.tokenizer
    answer = client.post("/tokenize", json={"prompt": "hé <|end|>", "return_token_strs": True}).json()
    assert answer["tokens"] == [tokenizer.bos_id, *tokenizer.encode("hé <|end|>")]
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 512
    bare = client.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False}).json()["tokens"]
    assert bare == tokenizer.encode("hé")
    chat = client.post("/tokenize", json={"messages": ASK["messages"]}).json()["tokens"]
    assert len(chat) == client.post("/v1/chat/completions", json=ASK).json()["usage"]["prompt_tokens"]
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": "hé"}
    special = client.post("/detokenize", json={"tokens": [tokenizer.special["<|end|>"]]}).json()
    assert special == {"prompt": "<|end|>"}
    for route, body, words in (
        ("tokenize", {}, "either"),
        ("tokenize", {"prompt": "a", "messages": ASK["messages"]}, "either"),
        ("detokenize", {"tokens": [99999]}, "vocabulary"),
        ("detokenize", {"tokens": [-1]}, "vocabulary"),
        ("detokenize", {"tokens": ["a"]}, "tokens.0"),
    ):
        refused = client.post(f"/{route}", json=body)
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


# Embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["decoder", "encoder", "translator"])
def test_embeddings_are_unit_means_of_hidden_states(which, engine, encoder, tiny_translator):
    made = {"decoder": lambda: engine, "encoder": lambda: encoder}.get(
        which, lambda: luban.Engine(luban.load_model(tiny_translator))
    )()
    m = made if which == "encoder" else made.model
    with TestClient(create_app(made), base_url=LOCAL) as client:
        texts = ["one", "a much longer text", [20, 30, 40]]
        answer = client.post("/v1/embeddings", json={"input": texts}).json()
        packed = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()
        for index, text in enumerate(texts):
            ends = m.ends_with_eos and which != "decoder"
            ids = text if isinstance(text, list) else m.tokenizer.encode(text, bos=True, eos=ends)
            tokens = torch.tensor([ids])
            with torch.inference_mode():
                hidden = m.module.encode(tokens).states if which == "translator" else m.module(tokens, output="hidden")
            want = torch.nn.functional.normalize(hidden[0].mean(0), dim=0).numpy()
            got = np.array(answer["data"][index]["embedding"], dtype=np.float32)
            np.testing.assert_allclose(got, want, atol=1e-5)
            raw = np.frombuffer(base64.b64decode(packed["data"][index]["embedding"]), dtype="<f4")
            np.testing.assert_allclose(raw, got, atol=1e-6)
        assert answer["usage"]["prompt_tokens"] > 3 and client.get("/v1/models").json()["data"][0]["id"] == m.name
        for body, words in (
            ({"input": []}, "empty"),
            ({"input": [[]]}, "empty"),
            ({"input": "x" * 600}, "context"),
            ({"input": [99999]}, "vocabulary"),
            ({"input": "a", "dimensions": 7}, "dimensions"),
            ({"input": 3}, "input"),
            ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ):
            refused = client.post("/v1/embeddings", json=body)
            assert refused.status_code == (422 if words == "context" else 400), body
            assert words in refused.json()["error"]["message"], (body, refused.text)
        if which == "encoder":
            assert not client.get("/v1/models").json()["data"][0]["chat"]
            for route, body in (("chat/completions", ASK), ("completions", {"prompt": "a"})):
                refused = client.post(f"/v1/{route}", json=body)
                assert refused.status_code == 400 and "writes no text" in refused.json()["error"]["message"]


# Completions that repeat their prompt -----------------------------------------------------------------------


def test_echo_repeats_the_prompt_with_its_log_probabilities(client, model):
    prompt = "hé!"
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]
    own = model.module(torch.tensor([ids]))[0].detach().log_softmax(-1)
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0, "ignore_eos": True}
    for most in (0, 3):
        (choice,) = client.post("/v1/completions", json={**body, "max_tokens": most}).json()["choices"]
        found = choice["logprobs"]
        assert choice["text"].startswith(prompt) and (most or choice["text"] == prompt)
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(ids) + most
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for at, token in enumerate(ids[1:]):
            assert found["token_logprobs"][at + 1] == pytest.approx(own[at, token].item(), abs=1e-3)
        assert choice["finish_reason"] == "length"
        with client.stream("POST", "/v1/completions", json={**body, "max_tokens": most, "stream": True}) as streamed:
            lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line]
        chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        assert [t for chunk in chunks for t in chunk["logprobs"]["tokens"]] == found["tokens"]
    usage = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()["usage"]
    assert usage["completion_tokens"] == 0 and usage["prompt_tokens"] == len(ids)


def test_log_probabilities_are_of_the_model_and_of_what_was_drawn_from(client):
    body = {**ASK, "logprobs": True, "top_logprobs": 1, "ignore_eos": True}
    (greedy,) = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert all(e["sampling_logprob"] == 0 and e["logprob"] < 0 for e in greedy["logprobs"]["content"])
    (drawn,) = client.post("/v1/chat/completions", json={**body, "temperature": 1}).json()["choices"]
    for entry in drawn["logprobs"]["content"]:
        assert entry["sampling_logprob"] == pytest.approx(entry["logprob"], abs=1e-4)
    (few,) = client.post("/v1/completions", json={"prompt": "a", "logprobs": 0, "top_k": 1}).json()["choices"]
    assert all(p == 0 for p in few["logprobs"]["sampling_logprobs"])


def test_biases_end_tokens_and_least_lengths(client, model):
    a, b = (model.tokenizer.encode(letter)[0] for letter in "ab")

    def ask(**fields):
        return client.post("/v1/completions", json={"prompt": "q", "temperature": 0, "max_tokens": 6, **fields}).json()[
            "choices"
        ][0]

    assert ask(logit_bias={str(a): 100})["text"] == "aaaaaa"
    assert ask(logit_bias={str(a): 100, str(b): 100}, stop_token_ids=[a, b])["text"] == ""
    ended = ask(logit_bias={str(a): 100}, stop_token_ids=[a], min_tokens=3)
    assert ended["finish_reason"] == "stop" and "a" not in ended["text"]
    for fields, words in (
        ({"logit_bias": {"99999": 1}}, "99999"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "99999"),
        ({"min_tokens": 7}, "min_tokens"),
    ):
        refused = client.post("/v1/completions", json={"prompt": "q", "max_tokens": 6, **fields})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"]


def test_beam_search_through_the_api_is_the_engines(client, engine):
    sampling = luban.Sampling(beams=4, n=2, max_tokens=6, length_penalty=0.5)
    (want,) = engine.generate("hé", sampling)
    body = {"prompt": "hé", "use_beam_search": True, "best_of": 4, "n": 2, "max_tokens": 6, "length_penalty": 0.5}
    answer = client.post("/v1/completions", json=body).json()
    assert [c["text"] for c in answer["choices"]] == [c.text for c in want.choices]
    assert answer["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in want.choices)
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
        lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line]
    assert [json.loads(line)["choices"][0]["text"] for line in lines[:-1]] == [c.text for c in want.choices]


# Structured output ------------------------------------------------------------------------------------------


def test_structured_output_in_both_spellings(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, "x"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for fields, fits in (
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}, json.loads),
        ({"structured_outputs": {"json": schema}}, json.loads),
        ({"structured_outputs": {"json": json.dumps(schema)}}, json.loads),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ["yes", "no"].index),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, lambda t: re.fullmatch("[ab]{3}", t).group()),
        ({"structured_outputs": {"grammar": 'start: "x" "y"?'}}, ["x", "xy"].index),
    ):
        answer = client.post("/v1/chat/completions", json={**ASK, "temperature": 1, "max_tokens": 400, **fields}).json()
        assert (
            fits(answer["choices"][0]["message"]["content"]) is not None
            and answer["choices"][0]["finish_reason"] == "stop"
        )
        plain = client.post("/v1/completions", json={"prompt": "q", "max_tokens": 400, **fields}).json()
        assert fits(plain["choices"][0]["text"]) is not None
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    for fields, words in (
        (both, "use one"),
        ({"structured_outputs": {"json": {"type": "objekt"}}}, "Invalid type: objekt"),
        ({"structured_outputs": {"yaml": "a"}}, "yaml"),
        ({"guided_json": schema}, "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}, "type": "object"}}}}, "if"),
    ):
        refused = client.post("/v1/chat/completions", json={**ASK, **fields})
        assert refused.status_code == 400 and words in refused.json()["error"]["message"], refused.text


def test_what_is_embedded_is_bounded(client, monkeypatch):
    monkeypatch.setattr(service_module, "MAX_SEQUENCES", 2)
    refused = client.post("/v1/embeddings", json={"input": ["a"] * 3})
    assert refused.status_code == 400 and "at most 2 texts" in refused.json()["error"]["message"]

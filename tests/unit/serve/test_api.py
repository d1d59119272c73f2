"""The HTTP API in this process: what is read, what is refused by name, whom it answers."""

from __future__ import annotations

import json
import time

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi.testclient import TestClient
from http_requests import ASK, LOCAL

import luban
from luban.core.errors import UnsupportedError
from luban.serve.api.app import create_app
from luban.tokenizer.chat import render


def post(client, path="chat/completions", **fields):
    return client.post(f"/v1/{path}", json={**(ASK if path.startswith("chat") else {"prompt": "ab"}), **fields})


# Fields ---------------------------------------------------------------------------------------------------


def test_nulls_are_as_good_as_nothing(client):
    """OpenAI's client sends them for what isn't set."""
    names = (
        "n",
        "stream",
        "logprobs",
        "top_logprobs",
        "stop",
        "seed",
        "tools",
        "functions",
        "tool_choice",
        "logit_bias",
        "frequency_penalty",
        "presence_penalty",
        "response_format",
        "stream_options",
        "ignore_eos",
        "user",
        "min_tokens",
        "stop_token_ids",
        "chat_template_kwargs",
        "model",
    )
    plain = post(client).json()
    answer = post(client, **dict.fromkeys(names))
    assert answer.status_code == 200 and answer.json()["choices"] == plain["choices"]
    assert (
        post(client, "completions", **dict.fromkeys(("n", "echo", "best_of", "suffix", "logprobs"))).status_code == 200
    )
    message = {**ASK["messages"][0], **dict.fromkeys(("name", "tool_calls", "tool_call_id", "function_call"))}
    assert post(client, messages=[message]).json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "now"}]),
        ("function_call", {"name": "now"}),
        ("tool_choice", "required"),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("bad_words", ["x"]),
        ("length_penalty", 0.5),
        ("best_of", 3),
        ("reasoning_effort", "low"),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("skip_special_tokens", False),
        ("echo", True),
        ("response_format", {"type": "xml"}),
        ("structured_outputs", {}),
        ("structured_outputs", {"regex": "a", "choice": ["a"]}),
    ],
)
def test_what_would_change_the_answer_and_is_not_built_is_named(client, name, value):
    answer = post(client, **{name: value})
    assert answer.status_code == 400 and f"'{name}'" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "said"), [("max_token", "did you mean 'max_tokens'"), ("foo", "known: "), ("name", "")]
)
def test_a_field_that_no_request_has_is_refused(client, name, said):
    answer = post(client, **{name: 5})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and f"'{name}' is no field of this request" in message and said in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"messages": "\xff"}', "it is not in UTF-8"),
        (b"[]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_object_is_said_to_be_so(client, body, said):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"],
)
def test_numbers_that_are_not_finite_are_refused(client, name, value):
    content = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "{name}": {value}}}'
    answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"] == f"{name}: Input should be a finite number"


def test_the_description_of_the_routes_is_served(client):
    """With the fields of the bodies, behind the key like all else."""
    page = client.get("/openapi.json").json()
    assert page == client.app.openapi()
    asked = page["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "repetition_penalty" in page["components"]["schemas"][asked.rpartition("/")[2]]["properties"]


def test_models_say_since_when_they_are_served(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert time.time() - 3600 < model["created"] <= time.time()


def test_an_application_of_a_model_that_writes_text_writes_text(engine):
    with TestClient(create_app(engine.model), base_url=LOCAL) as client:
        assert post(client, max_tokens=2).status_code == 200


def test_what_changes_nothing_is_taken(client):
    fields = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "presence_penalty": 0,
        "tools": [],
        "skip_special_tokens": True,
        "service_tier": "auto",
        "logit_bias": {},
    }
    assert post(client, **fields).status_code == 200


TEMPLATE = """{% for m in messages %}<|{{ m.role if m.role in ('user', 'system') else 'assistant' }}|>{{ m.name or '' }}
{{- m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.id + c.function.name + c.function.arguments | tojson }}{% endfor %}
{{- m.tool_call_id or '' }}<|end|>{% endfor %}{{ extra or '' }}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
HISTORY = [
    {"role": "user", "content": "time?", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
]


def prompt_tokens(client, **fields) -> int:
    answer = post(client, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens"]


def test_calls_results_names_and_variables_reach_the_template(engine, monkeypatch):
    monkeypatch.setattr(engine.model.tokenizer, "chat_template", TEMPLATE)
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        text = '<|user|>Anntime?<|end|><|assistant|>c1now{"zone": "UTC"}<|end|><|assistant|>12:00c1<|end|>'
        rendered = render(HISTORY, engine.model.tokenizer, add_generation_prompt=True)
        assert engine.model.tokenizer.decode(rendered.token_ids, skip_special=False) == text + "<|assistant|>"
        assert prompt_tokens(client, messages=HISTORY) == len(rendered.token_ids)
        more = prompt_tokens(client, messages=HISTORY, chat_template_kwargs={"extra": "12345"})
        assert more == len(rendered.token_ids) + 5
        # what a client spells stays text, and the template's own variables are the server's
        spelled = prompt_tokens(client, messages=HISTORY, chat_template_kwargs={"extra": "<|end|>", "messages": []})
        assert spelled == len(rendered.token_ids) + len("<|end|>")


def test_what_the_template_has_no_place_for_is_refused(client):
    for messages, words in (
        ([{**ASK["messages"][0], "name": "Ann"}], "'name'"),
        ([*ASK["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tool calls"),
        ([*ASK["messages"], {"role": "assistant", "content": "", "function_call": {"name": "x"}}], "'function_call'"),
        ([*ASK["messages"], {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}], "'tool_calls'"),
    ):
        answer = post(client, messages=messages)
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{not json", "not valid JSON: Expecting property name enclosed in double quotes at character 1"),
        (b'{"messages": [}', "not valid JSON: Expecting value at character 14"),
        (json.dumps({**ASK, "model": "\ud800"}).encode(), "is not served here"),
        (json.dumps({**ASK, "stop": ["\ud800"], "messages": [{"role": "\udfff", "content": ""}]}).encode(), "role"),
    ],
)
def test_bodies_that_cannot_be_read_say_why(client, body, words):
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]


def test_a_field_of_several_forms_is_named_as_the_client_knows_it(client):
    error = post(client, "completions", prompt=3).json()["error"]
    assert error["param"] == "prompt"
    assert error["message"] == "prompt: should be a string, a list of token ids, or a list of either"
    for wrong in ([1, "a"], [[1], ["a"]], [[1.0]], [True], {"a": 1}, ["a", 1]):
        assert post(client, "completions", prompt=wrong).json()["error"] == error
    error = post(client, messages=[{"role": "user", "content": 3}]).json()["error"]
    assert (
        error["param"] == "messages.0.content" and "valid string, or Input should be a valid list" in error["message"]
    )
    assert post(client, "completions", stop=3).json()["error"]["param"] == "stop"
    assert post(client, messages=None).json()["error"]["message"] == "messages: Field required"


def test_lone_surrogates_in_a_conversation_are_answered(client):
    body = json.dumps({**ASK, "messages": [{"role": "user", "content": "a\ud800b"}]}).encode()
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200


# Who may ask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("app.localhost", 200),
        ("LOCALHOST.", 200),
        ("models.example.org:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("evil.example:127", 403),
        ("2130706433.evil", 403),
    ],
)
def test_only_names_of_this_server_are_answered(engine, host, status):
    with TestClient(create_app(engine, hosts=["Models.example.org"]), base_url=LOCAL) as client:
        for path in ("/v1/models", "/health", "/"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code == status
        assert (
            status == 200 or f"--allowed-host {host.partition(':')[0]}" in client.get("/", headers={"Host": host}).text
        )


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost", 200),
        ("https://localhost", 200),
        ("https://chat.example.org", 200),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("https://chat.example.org.evil.example", 403),
    ],
)
def test_pages_of_other_sites_are_refused_unless_allowed(engine, origin, status):
    with TestClient(create_app(engine, origins=["https://chat.example.org"]), base_url=LOCAL) as client:
        headers = {} if origin is None else {"Origin": origin}
        simple = {**headers, "Content-Type": "text/plain"}  # what a page may send without asking first
        assert client.post("/v1/chat/completions", content=json.dumps(ASK), headers=simple).status_code in (status, 400)
        answer = client.get("/v1/models", headers=headers)
        assert answer.status_code == status
        shared = origin == "https://chat.example.org"
        assert answer.headers.get("access-control-allow-origin") == (origin if shared else None)


def test_a_preflight_is_answered_where_a_site_is_allowed_and_a_key_is_set(engine):
    ask = {
        "Origin": "https://chat.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    with TestClient(create_app(engine, api_key="k", origins=["https://chat.example.org"]), base_url=LOCAL) as client:
        answer = client.options("/v1/chat/completions", headers=ask)
        assert answer.status_code == 200 and "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert client.get("/v1/models", headers={"Origin": ask["Origin"]}).status_code == 401
    with TestClient(create_app(engine, api_key="k"), base_url=LOCAL) as client:
        assert client.options("/v1/chat/completions", headers=ask).status_code == 403


def test_a_stopped_server_ends_what_runs_with_an_error(engine):
    app = create_app(engine)
    with TestClient(app, base_url=LOCAL) as client:
        long = {**ASK, "max_tokens": 400, "ignore_eos": True}
        step = engine.step

        def stop_then_step():
            app.state.service.stop()
            return step()

        engine.step = stop_then_step
        try:
            whole = client.post("/v1/chat/completions", json=long)
            with client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as streamed:
                lines = [line for line in streamed.iter_lines() if line]
        finally:
            engine.step = step
        assert whole.status_code == 503 and "being stopped" in whole.json()["error"]["message"]
        assert "being stopped" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]


def test_a_device_that_is_not_there_is_one_line(tiny_checkpoint):

    for device in ("quantum", *(() if torch.cuda.is_available() else ("cuda", "cuda:3"))):
        with pytest.raises(UnsupportedError, match=rf"device '{device}'") as refused:
            luban.load_model(tiny_checkpoint, device=device)
        assert "\n" not in str(refused.value)


def test_a_port_that_cannot_be_is_one_line(capsys):
    from luban.cli.main import main

    for port in ("-1", "65536"):
        assert main(["serve", "nothing", "--port", port]) == 2
        assert "--port must be from 0" in capsys.readouterr().err


def test_the_help_shows_a_request_that_is_answered(client):
    from luban.cli.serve import EXAMPLES

    (body,) = [line.partition(" -d '")[2].removesuffix("'") for line in EXAMPLES.splitlines() if " -d '" in line]
    assert client.post("/v1/chat/completions", json={**json.loads(body), "max_tokens": 3}).status_code == 200

"""A real server on a free port, asked as OpenAI's clients ask."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
KEY = "k-ey"
AUTH = {"Authorization": f"Bearer {KEY}"}


def start(model, *arguments):
    """A server process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("LUBAN_API_KEY", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "luban", "serve", str(model), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"at (http://\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            while process.poll() is None:
                try:
                    httpx.get(f"{found[1]}/health", timeout=None)
                    return process, found[1], "".join(said)
                except httpx.TransportError:
                    time.sleep(0.05)
    raise AssertionError("".join(said))


def stop(process):
    process.terminate()
    assert process.wait() in (0, -15, 130, 143)


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    process, address, _ = start(tiny_checkpoint, "--port", "0", "--api-key", KEY)
    yield httpx.Client(base_url=address, headers=AUTH, timeout=None)
    stop(process)


CHAT = {"model": "tiny-bytes", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 12, "seed": 4}


def events(response):
    lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_models_and_health(server):
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "tiny-bytes" and model["object"] == "model" and model["chat"]
    assert server.get("/v1/models/tiny-bytes").json() == model
    assert httpx.get(server.base_url.join("/health"), timeout=None).json() == {"status": "ok"}


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", KEY[:-1]])
def test_every_route_but_health_and_page_needs_the_key(server, key):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.base_url, headers=headers) as stranger:
        routes = [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/tiny-bytes"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/docs"),
            ("GET", "/openapi.json"),
            ("GET", "/nowhere"),
            ("OPTIONS", "/v1/completions"),
            ("GET", "/health/"),
            ("GET", "/health/../v1/models"),
            ("GET", "/page/../v1/models"),
            ("POST", "/v1/completions/"),
            ("GET", "/redoc"),
        ]
        for method, route in routes:
            answer = stranger.request(method, route, json=CHAT if method == "POST" else None)
            assert answer.status_code == 401, (method, route)
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get("/health").status_code == 200
        assert "Luban" in stranger.get("/").text
        assert stranger.get("/page/chat.js").headers["content-type"].startswith("text/javascript")


def test_every_route_of_the_application_is_guarded(tiny_checkpoint):
    """Also those added later: only the listed ones may answer without the key."""
    import luban
    from luban.serve.api.app import OPEN, create_app

    app = create_app(luban.Engine(luban.load_model(tiny_checkpoint)), api_key=KEY)
    from fastapi.testclient import TestClient

    with TestClient(app, base_url="http://localhost") as client:
        for route in app.routes:
            path = route.path.replace("{name:path}", "x")
            for method in getattr(route, "methods", None) or {"GET"}:
                assert (client.request(method, path).status_code == 401) == (path not in OPEN), path


def test_chat_whole_and_streamed_agree(server):
    body = {**CHAT, "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", json=body).json()
    with server.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    first, second = whole["usage"], chunks[-1]["usage"]
    cached = [each.pop("prompt_tokens_details")["cached_tokens"] for each in (first, second)]
    assert first == second and chunks[-1]["choices"] == []
    assert (
        cached[0] <= cached[1] == (first["prompt_tokens"] - 1) // 16 * 16
    )  # the streamed one finds the other's blocks
    assert whole["usage"]["completion_tokens"] == 24
    assert whole["usage"]["total_tokens"] == 24 + whole["usage"]["prompt_tokens"]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert choice["finish_reason"] == "length" == mine[-1]["finish_reason"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        entries = choice["logprobs"]["content"]
        assert len(entries) == 12 and all(len(e["top_logprobs"]) == 2 and e["logprob"] <= 0 for e in entries)
        streamed = [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]]
        assert [e["token"] for e in streamed] == [e["token"] for e in entries]
        assert [e["logprob"] for e in streamed] == pytest.approx([e["logprob"] for e in entries], abs=1e-4)
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert server.post("/v1/chat/completions", json=body).json()["choices"] == whole["choices"]  # the seed repeats


def test_completions_of_several_prompts_and_forms(server):
    body = {"prompt": ["ab", "c"], "max_tokens": 5, "seed": 1, "n": 2, "ignore_eos": True, "logprobs": 1}
    whole = server.post("/v1/completions", json=body).json()
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3] and whole["object"] == "text_completion"
    assert all(len(c["logprobs"]["tokens"]) == len(c["logprobs"]["token_logprobs"]) == 5 for c in whole["choices"])
    with server.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        chunks = events(response)
    for choice in whole["choices"]:
        pieces = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(pieces) == choice["text"]
    equal = server.post("/v1/completions", json={**body, "prompt": ["ab", "ab"], "max_tokens": 16}).json()["choices"]
    assert len({c["text"] for c in equal}) == 4  # every prompt has draws of its own
    ids = server.post("/v1/completions", json={"prompt": [20, 30], "temperature": 0}).json()
    assert ids["usage"]["prompt_tokens"] == 2 and ids["usage"]["completion_tokens"] <= 16


def test_stop_strings_end_with_stop(server):
    body = {"prompt": "abc", "max_tokens": 30, "seed": 3, "ignore_eos": True}
    text = server.post("/v1/completions", json=body).json()["choices"][0]["text"]
    cut = server.post("/v1/completions", json={**body, "stop": [text[5:7]]}).json()["choices"][0]
    assert cut["text"] == text[: text.find(text[5:7])] and cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", b"{not json", 400, "JSON"),
        ("completions", b"[]", 400, ""),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "x", "n": 0}, 400, "n"),
        ("completions", {"prompt": "x", "model": "gpt-9"}, 404, "gpt-9"),
        ("completions", {"prompt": "x" * 1000}, 422, "1001 tokens"),
        ("completions", {"prompt": []}, 400, "empty"),
        ("completions", {"prompt": [5, 99999]}, 400, "vocabulary"),
        ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "echo"),
        ("completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, 400, "unclosed group"),
        ("completions", {"prompt": "x", "response_format": {"type": "json_schema"}}, 400, "schema"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "x" * 700}]}, 422, "context"),
        (
            "chat/completions",
            {**CHAT, "stream": True, "messages": [{"role": "user", "content": "x" * 700}]},
            422,
            "context",
        ),
    ],
)
def test_bad_requests_get_openais_error(server, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"] and set(error) == {"message", "type", "param", "code"}


def test_an_unknown_route_has_the_same_shape(server):
    for route, status in (("/v1/embeddings", 405), ("/v1/images", 404)):
        answer = server.get(route)
        assert answer.status_code == status and f"no route GET {route}" in answer.json()["error"]["message"]


def test_many_at_once_each_get_their_own(server):
    def ask(seed):
        body = {"prompt": "p" * (1 + seed % 5), "max_tokens": 20, "seed": seed, "ignore_eos": True}
        return server.post("/v1/completions", json=body).json()["choices"][0]["text"]

    alone = [ask(seed) for seed in range(8)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=s: together.update({s: ask(s)})) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[s] for s in range(8)] == alone


def test_a_client_that_leaves_stops_its_generation(tiny_checkpoint):
    """Through the application itself, where the engine can be looked at."""
    import asyncio

    import luban
    from luban import Sampling
    from luban.serve.engine import Request
    from luban.serve.worker import Worker

    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    request = Request(engine.tokens_of("leave"), Sampling(max_tokens=120, ignore_eos=True))
    step, left = engine.step, threading.Event()

    def step_until_a_token_then_wait():
        if request.result.token_ids:
            left.wait()
        return step()

    engine.step = step_until_a_token_then_wait
    worker = Worker(engine)
    worker.start()

    async def leave():
        deltas = worker.run([request])
        async for _ in deltas:
            break
        await deltas.aclose()
        left.set()
        while not request.done:
            await asyncio.sleep(0.02)

    asyncio.run(leave())
    assert request.result.finish_reason == "cancelled" and len(request.result.token_ids) < 120
    worker.stop()
    assert not worker.alive and not engine.running


def test_a_taken_port_moves_on_and_no_key_warns(server, tiny_checkpoint):
    taken = server.base_url.port
    process, address, said = start(tiny_checkpoint, "--port", str(taken))
    try:
        assert address != str(server.base_url) and f"port {taken} is taken" in said
        assert address.startswith("http://127.0.0.1:") and "no --api-key" in said
        assert httpx.get(f"{address}/v1/models", timeout=None).status_code == 200
    finally:
        stop(process)


def test_an_encoder_decoder_is_served(tiny_translator):
    import luban

    engine = luban.Engine(luban.load_model(tiny_translator))
    want = engine.generate(["one", "three four"], luban.Sampling(max_tokens=9, temperature=0))
    process, address, _ = start(tiny_translator, "--port", "0")
    try:
        with httpx.Client(base_url=address, timeout=None) as client:
            (model,) = client.get("/v1/models").json()["data"]
            assert not model["chat"] and model["context"] == 64
            body = {"prompt": ["one", "three four"], "max_tokens": 9, "temperature": 0}
            whole = client.post("/v1/completions", json=body).json()
            assert [c["text"] for c in whole["choices"]] == [r.text for r in want]
            assert [c["finish_reason"] for c in whole["choices"]] == [r.finish_reason for r in want]
            assert whole["usage"]["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in want)
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                chunks = events(response)
            for choice in whole["choices"]:
                pieces = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
                assert "".join(pieces) == choice["text"]
            refused = client.post("/v1/chat/completions", json={**CHAT, "model": "tiny-translator"})
            assert refused.status_code == 400 and "chat template" in refused.json()["error"]["message"]
            refused = client.post("/v1/completions", json={"prompt": "x" * 99})
            assert refused.status_code == 422 and "the model reads 64 at most" in refused.json()["error"]["message"]
    finally:
        stop(process)


def test_makers_settings_hold_until_the_request_says_otherwise(tiny_checkpoint, tmp_path):
    import shutil

    import luban

    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 5}))
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    greedy, drawn = (
        engine.generate("hi", luban.Sampling(max_tokens=n, temperature=t, seed=3, repetition_penalty=p))[0].text
        for n, t, p in ((5, 0, 1), (9, 1, 1.3))
    )
    process, address, _ = start(model, "--port", "0")
    try:
        with httpx.Client(base_url=address, timeout=None) as client:
            for asked, want in (
                ({}, greedy),
                ({"temperature": 1, "max_tokens": 9, "seed": 3, "repetition_penalty": 1.3}, drawn),
            ):
                answer = client.post("/v1/completions", json={"prompt": "hi", **asked}).json()
                assert answer["choices"][0]["text"] == want
            chat = client.post("/v1/chat/completions", json={"messages": CHAT["messages"]}).json()
            assert chat["usage"]["completion_tokens"] <= 5
    finally:
        stop(process)


@pytest.mark.parametrize("signals", ["SIGTERM", "SIGINT SIGINT", "SIGTERM SIGINT SIGINT"])
def test_a_stopped_server_ends_its_streams_and_shows_no_traceback(tiny_checkpoint, signals):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "luban", "serve", str(tiny_checkpoint), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"at (http://\S+)", line):
            break
    body = {**CHAT, "stream": True, "n": 8, "max_tokens": 450, "ignore_eos": True}
    ends: list[str] = []
    begun = threading.Barrier(5)

    def ask():
        with (
            httpx.Client(base_url=found[1], timeout=None) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            lines = (line for line in response.iter_lines() if line)
            first = next(lines)
            begun.wait()
            ends.append([first, *lines][-1])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    for name in signals.split():
        process.send_signal(signal.Signals[name])
    for thread in threads:
        thread.join()
    said.append(process.stderr.read())
    assert process.wait() in (0, -15, 130, 143)
    assert len(ends) == 4 and all(end == "data: [DONE]" or "being stopped" in end for end in ends)
    assert "Traceback" not in "".join(said), "".join(said)


def test_an_evaluation_through_the_server_gives_the_models_own_numbers(server, tiny_checkpoint, tmp_path):
    from evals_shared import CHOICE, COLOURS, write_task

    from luban.evals.run import EvalOptions, evaluate

    choose = write_task(tmp_path, "choose", CHOICE, COLOURS)
    spec = {"prompt": "{{q}}", "target": "none", "kind": {"type": "generate", "max_tokens": 6}}
    said = write_task(tmp_path, "say", spec, COLOURS)
    options = EvalOptions(api_key=KEY)
    served = evaluate(str(server.base_url), [choose, said], tmp_path / "served", options)
    local = evaluate(str(tiny_checkpoint), [choose, said], tmp_path / "local", EvalOptions())
    for one, other in zip(served.rows, local.rows, strict=True):
        assert one["answer"] == other["answer"] and one.get("raw") == other.get("raw")
        ours, theirs = ([c["logprob"] for c in row.get("choices", ())] for row in (one, other))
        assert ours == pytest.approx(theirs, abs=1e-3)
    chat = evaluate(str(server.base_url), [said], tmp_path / "chat", EvalOptions(api_key=KEY, chat="on"))
    alone = evaluate(str(tiny_checkpoint), [said], tmp_path / "alone", EvalOptions(chat="on"))
    assert [row["raw"] for row in chat.rows] == [row["raw"] for row in alone.rows]

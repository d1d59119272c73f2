"""What an operator of a server relies on: keys, request ids, logs, the queue, starting, draining, figures, priorities."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient
from http_requests import ASK, LOCAL

import luban
from luban.serve.api.app import OPEN, ServerOptions, create_app


def test_every_route_needs_the_key_but_health_and_page(engine):
    app = create_app(engine, ServerOptions(api_key="k", more_adapters=True))
    with TestClient(app, base_url=LOCAL) as client:
        asked = set()
        for route in app.routes:
            path = route.path.replace("{name:path}", "x")
            for method in route.methods:
                asked.add(path)
                for headers in (
                    {},
                    {"Authorization": "Bearer kk"},
                    {"Authorization": "k"},
                    {"Authorization": "Bearer é".encode()},
                ):
                    answer = client.request(method, path, headers=headers)
                    assert (answer.status_code == 401) == (path not in OPEN), (method, path)
                right = client.request(method, path, headers={"Authorization": "Bearer k"})
                assert right.status_code != 401
    assert {"/metrics", "/tokenize", "/detokenize", "/v1/embeddings", "/v1/chat/completions"} <= asked


def test_request_ids_are_the_clients_or_new_ones(client):
    mine = client.get("/health", headers={"X-Request-Id": "abc-1.2:3"})
    assert mine.headers["X-Request-Id"] == "abc-1.2:3"
    made = [client.get("/nowhere", headers=h).headers["X-Request-Id"] for h in ({}, {}, {"X-Request-Id": "a b"})]
    assert len(set(made)) == 3 and all(re.fullmatch("[0-9a-f]{32}", name) for name in made)


@pytest.mark.parametrize("text", [False, True])
def test_the_log_is_a_json_line_a_request_without_its_text(engine, capsys, text):
    with TestClient(create_app(engine, ServerOptions(log_requests=True, log_text=text)), base_url=LOCAL) as client:
        secret = {**ASK, "messages": [{"role": "user", "content": "sécret"}]}
        client.post("/v1/chat/completions", json=secret, headers={"X-Request-Id": "first"})
        client.post("/v1/chat/completions", json={**secret, "stream": True}).read()
        client.post("/v1/completions", json={"prompt": "sécret", "temperature": -1})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    whole, streamed, refused = lines
    assert whole["request_id"] == "first" and whole["path"] == "/v1/chat/completions" and whole["status"] == 200
    for line in (whole, streamed):
        assert line["completion_tokens"] == 3 or line["finish"] == ["stop"]
        assert 0 < line["first_token_seconds"] <= line["seconds"] and line["prompt_tokens"] > 5
    assert refused["status"] == 400 and "prompt_tokens" not in refused
    assert ("sécret" in json.dumps(lines, ensure_ascii=False)) == text


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_whose_client_leaves_is_counted_and_logged(model, capsys, stream):
    """Each of its choices once, as cancelled; one that has ended before counts as what it ended by."""
    engine = luban.Engine(model)
    step, begun = engine.step, threading.Event()

    def slow_step():
        time.sleep(0.005)
        more = step()
        if any(running.growing.tokens for running in list(engine.running.values())):
            begun.set()
        return more

    engine.step = slow_step
    app = create_app(engine, ServerOptions(log_requests=True))
    body = json.dumps({**ASK, "max_tokens": 400, "n": 2, "ignore_eos": True, "stream": stream}).encode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
    }
    scope |= {"headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}

    async def leave():
        left, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        answering = asyncio.create_task(app(scope, receive, send))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        left.set()
        await answering

    with TestClient(app, base_url=LOCAL) as client:
        client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "ignore_eos": True, "n": 3})
        begun.clear()
        client.portal.call(leave)
        counted = client.get("/metrics").text
    assert 'luban_requests_finished_total{reason="length"} 3.0' in counted
    assert 'luban_requests_finished_total{reason="cancelled"} 2.0' in counted
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert lines[1]["status"] == (200 if stream else 499) and lines[1]["finish"] == ["cancelled"] * 2
    assert 0 < lines[1]["completion_tokens"] < 800


def test_a_full_queue_is_answered_429_and_empties(model, monkeypatch):
    engine = luban.Engine(model, max_batch=1)
    app = create_app(engine, ServerOptions(max_queue=2))
    go, step = threading.Event(), engine.step

    def wait_then_step():
        go.wait()
        return step()

    engine.step = wait_then_step
    with TestClient(app, base_url=LOCAL) as client:
        threads, answers = [], []
        for _ in range(2):
            thread = threading.Thread(
                target=lambda: answers.append(client.post("/v1/completions", json={"prompt": "a"}))
            )
            thread.start()
            threads.append(thread)
        while engine.load().waiting < 2:
            pass
        full = client.post("/v1/chat/completions", json=ASK)
        assert full.status_code == 429 and int(full.headers["Retry-After"]) > 0
        assert full.json()["error"]["code"] == "queue_full" and "2 sequences wait" in full.json()["error"]["message"]
        assert "luban_requests_refused_total 1.0" in client.get("/metrics").text
        go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_a_server_is_503_while_it_loads_and_keeps_what_broke(engine):
    go = threading.Event()

    def load():
        go.wait()
        return engine

    app = create_app(load, api_key="k")
    auth = {"Authorization": "Bearer k"}
    ended = threading.Event()
    app.state.service.on_loaded = ended.set
    with TestClient(app, base_url=LOCAL) as client:
        loading = client.get("/health")
        assert loading.status_code == 503 and loading.json() == {"status": "loading"}
        assert client.get("/").status_code == 200 and client.get("/v1/models").status_code == 401
        for answer in (client.get("/v1/models", headers=auth), client.post("/v1/completions", json={}, headers=auth)):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading"
            assert int(answer.headers["Retry-After"]) > 0
        go.set()
        ended.wait()
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/chat/completions", json=ASK, headers=auth).status_code == 200
    broken = create_app(lambda: 1 / 0)
    ended.clear()
    broken.state.service.on_loaded = ended.set
    with TestClient(broken, base_url=LOCAL) as client:
        ended.wait()
        assert isinstance(broken.state.service.broken, ZeroDivisionError)
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_draining_refuses_what_comes_and_lets_what_runs_end(engine, patience):
    """With no patience what runs is ended with an error."""
    app = create_app(engine)
    service = app.state.service
    go, step = threading.Event(), engine.step

    def wait_then_step():
        go.wait()
        return step()

    engine.step = wait_then_step
    try:
        with TestClient(app, base_url=LOCAL) as client:
            answers = []
            body = {**ASK, "max_tokens": 40, "ignore_eos": True}
            thread = threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=body)))
            thread.start()
            while not service.active:
                pass
            drained = client.portal.start_task_soon(service.drain, patience)
            while not service.draining:
                pass
            assert client.get("/health").json() == {"status": "draining"}
            late = client.post("/v1/chat/completions", json=ASK)
            assert late.status_code == 503 and "being stopped" in late.json()["error"]["message"]
            if patience:
                go.set()
            drained.result()
            go.set()
            thread.join()
            assert answers[0].status_code == (200 if patience else 503)
            assert not patience or answers[0].json()["usage"]["completion_tokens"] == 40
    finally:
        go.set()
        engine.step = step


def test_figures_for_prometheus(engine):
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        body = {**ASK, "messages": [{"role": "user", "content": "x" * 60}], "ignore_eos": True, "max_tokens": 5, "n": 2}

        def figures():
            text = client.get("/metrics").text
            rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
            return {name: float(value) for name, _, value in rows}

        before = figures()
        usage = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2)]
        after = figures()

        def more(name):
            return after[f"luban_{name}"] - before.get(f"luban_{name}", 0.0)

        assert more("generation_tokens_total") == sum(u["completion_tokens"] for u in usage) == 20
        assert more("prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage)
        assert more("time_to_first_token_seconds_count") == 4 and more("inter_token_latency_seconds_count") == 16
        assert more("request_duration_seconds_count") == 4 and more('requests_finished_total{reason="length"}') == 4
        assert more("prefix_cache_queries_total") > more("prefix_cache_hits_total") >= 48
        assert after["luban_requests_running"] == after["luban_requests_waiting"] == 0
        assert after["luban_kv_cache_usage_ratio"] == 0 and "luban_preemptions_total" in after


def test_usage_tells_of_tokens_that_the_prefix_cache_held(model):
    """All full blocks of 16 of what earlier prompts began with, but never a prompt's last token; of several prompts the sum; the
    same in streams; nothing where all tokens are read for their log-probabilities. Together what /metrics counts."""
    letters, told = random.SystemRandom(), []
    common = "".join(letters.choices("abcdefgh", k=100))
    with TestClient(create_app(luban.Engine(model)), base_url=LOCAL) as client:

        def cached(path, **body):
            body = {"max_tokens": 2, "ignore_eos": True, **body}
            if body.get("stream"):
                with client.stream("POST", path, json={**body, "stream_options": {"include_usage": True}}) as answer:
                    lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
                usage = json.loads(lines[-2])["usage"]
            else:
                usage = client.post(path, json=body).json()["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            told.append(usage["prompt_tokens_details"]["cached_tokens"])
            return told[-1], usage["prompt_tokens"]

        bos = 1 if model.begins_with_bos else 0
        whole = (100 + bos - 1) // 16 * 16
        assert cached("/v1/completions", prompt=common) == (0, 100 + bos)
        for more in ({}, {"stream": True}, {"n": 3}):
            assert cached("/v1/completions", prompt=common, **more) == (whole, 100 + bos)
        shared = (50 + bos) // 16 * 16
        assert cached("/v1/completions", prompt=[common, common[:50] + "zz" * 20])[0] == whole + shared
        assert cached("/v1/completions", prompt=common, prompt_logprobs=0)[0] == 0
        chat = {"messages": [{"role": "user", "content": common}]}
        assert cached("/v1/chat/completions", **chat)[0] == 0
        for more in ({}, {"stream": True}):
            found, count = cached("/v1/chat/completions", **chat, **more)
            assert found == (count - 1) // 16 * 16
        page = client.get("/metrics").text
        assert f"luban_prefix_cache_hits_total {float(sum(told))}\n" in page


def test_a_preempted_request_tells_of_what_it_found_first(model):
    """Not of its own blocks, which it finds when it is read again."""
    block = 16 * luban.Engine(model, max_batch=4).budget.slot_bytes
    prompts = [random.SystemRandom().choices(range(20, 270), k=40) for _ in range(3)]
    engine = luban.Engine(model, max_batch=4, cache_bytes=11 * block)
    requests = [engine.request(one, luban.Sampling(max_tokens=40, ignore_eos=True, seed=1)) for one in prompts]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    assert engine.load().preemptions and [request.cached_tokens for request in requests] == [0, 0, 0]


def test_smaller_priorities_are_served_first(model):
    engine = luban.Engine(model, max_batch=1)
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        order: list[str] = []
        go, step = threading.Event(), engine.step

        def wait_then_step():
            go.wait()
            return step()

        engine.step = wait_then_step

        def ask(name, priority):
            client.post("/v1/completions", json={"prompt": name, "priority": priority, "ignore_eos": True})
            order.append(name)

        threads = []
        for count, (name, priority) in enumerate((("first", 0), ("late", 5), ("mid", 0), ("early", -3)), 1):
            threads.append(threading.Thread(target=ask, args=(name, priority)))
            threads[-1].start()
            while engine.load().waiting < count:
                pass
        go.set()
        for thread in threads:
            thread.join()
        assert order == ["early", "first", "mid", "late"]

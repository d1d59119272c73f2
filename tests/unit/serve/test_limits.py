"""What a server bounds: bodies, prompts, memory for keys and values; and that one request never costs another's answer."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx
from fastapi.testclient import TestClient
from http_requests import LOCAL

import luban
from luban import Sampling
from luban.core.errors import ConfigError
from luban.generate.cache import GROW, ContextError, PromptTooLong
from luban.generate.session import Session
from luban.serve.api.app import create_app
from luban.serve.api.bodies import MAX_SEQUENCES, MAX_STOPS
from luban.serve.api.body_limit import BodyLimit, body_limit
from luban.serve.api.chat_body import MAX_MESSAGES, MAX_PARTS
from luban.serve.engine import Request
from luban.serve.intake import COUNTED, FIRST_CHARACTERS, Intake
from luban.serve.memory import ContiguousBudget, PagedBudget, RequestTooLarge
from luban.serve.model_runner import ModelRunner
from luban.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def client(model):
    with TestClient(create_app(luban.Engine(model)), base_url=LOCAL) as client:
        yield client


def slots(model, count: int) -> int:
    """Bytes of so many tokens' keys and values, by arithmetic over the specification."""
    spec = model.spec
    return count * sum(2 * a.key_heads * a.head_dim * 4 for a in (x.mixer.attention(spec.width) for x in spec.layers))


# Bodies and prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("size", [99, 100, 101, 5000])
def test_bodies_above_the_limit_are_refused_before_they_are_read_whole(declared, size):
    read, sent = [], []
    pieces = [b"x" * min(40, size - at) for at in range(0, size, 40)]

    async def receive():
        piece = pieces.pop(0)
        read.append(len(piece))
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await send({"type": "read"})

    async def ask():
        headers = [(b"content-length", str(size).encode())] if declared else []
        try:
            await BodyLimit(app, lambda: 100)({"type": "http", "headers": headers}, receive, send)
        except Exception as error:  # the application's handler answers it
            sent.append({"type": "http.response.start", "status": error.status_code})

    asyncio.run(ask())
    if size <= 100:
        assert sent == [{"type": "read"}] and sum(read) == size
    else:
        assert sent[0]["status"] == 413 and sum(read) <= (0 if declared else 140)


@pytest.mark.parametrize("chunked", [True, False])
def test_large_bodies_are_answered_in_the_apis_shape(client, model, chunked):
    body = json.dumps({"prompt": "a" * body_limit(model.spec.context)}).encode()
    answer = client.post("/v1/completions", content=iter([body[:1000], body[1000:]]) if chunked else body)
    assert answer.status_code == 413 and "larger than this server reads" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "prompt", ["a"] * (MAX_SEQUENCES + 1)),
        ("completions", "stop", ["a"] * (MAX_STOPS + 1)),
        ("chat/completions", "messages", [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)),
        (
            "chat/completions",
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_PARTS + 1)}],
        ),
    ],
)
def test_lists_are_bounded(client, path, field, value):
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], field: value}
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400 and "at most" in answer.json()["error"]["message"]


def test_answers_of_one_request_are_bounded(client):
    answer = client.post("/v1/completions", json={"prompt": ["a"] * 100, "n": 100})
    assert answer.status_code == 400 and f"more than {MAX_SEQUENCES} answers" in answer.json()["error"]["message"]


def refusal(client, text, chat):
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    answer = client.post(f"/v1/{'chat/' if chat else ''}completions", json=body)
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "context_length_exceeded"
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_that_is_too_long_is_told_both_numbers_of_tokens(client, model, chat):
    for text in ("word " * 200, "x" * 100_000):
        if chat:
            count = len(
                client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
            )
        else:
            count = client.post("/tokenize", json={"prompt": text}).json()["count"]
        said = refusal(client, text, chat)
        assert f"the prompt has {count} tokens, and the model's context of {model.spec.context} must" in said


@pytest.mark.parametrize("chat", [True, False])
def test_refusing_a_long_prompt_costs_no_more_than_the_contexts_worth(client, model, monkeypatch, chat):
    """Or than a fixed number of characters, where it tells how many tokens there are at least."""
    read = []

    def counting(function):
        return lambda self, text, *a, **k: read.append(len(text)) or function(self, text, *a, **k)

    for name in ("encode", "encode_plain", "encode_marked"):
        monkeypatch.setattr(Tokenizer, name, counting(getattr(Tokenizer, name)))
    text = "word " * 300_000
    count = len(model.tokenizer.encode(text))
    read.clear()
    said = refusal(client, text, chat)
    least = int(re.search(r"the prompt has more than (\d+) tokens", said)[1])
    assert 0.1 * count < least < count and f"the model's context of {model.spec.context} must also" in said
    assert sum(read) <= COUNTED
    with pytest.raises(PromptTooLong, match="more than"):  # and where it is only asked whether it fits
        Intake(model, luban.Engine(model).batch).require_room(text, 0)
    assert sum(read) <= COUNTED + FIRST_CHARACTERS * model.spec.context


def test_prompts_that_fit_are_never_refused_by_their_beginning(model):
    engine, rng = luban.Engine(model), random.Random()
    context = model.spec.context
    for _ in range(30):
        text = "".join(rng.choice("ab cdé漢 \n") * rng.choice([1, 1, 40]) for _ in range(rng.randrange(1, 4 * context)))
        count = len(model.tokenizer.encode(text, bos=model.begins_with_bos))
        try:
            assert len(engine.tokens_of(text)) == count < context
        except ContextError:
            assert count >= context
        try:
            engine.intake.require_room(text, 0)
        except PromptTooLong as error:
            assert context <= int(re.search(r"more than (\d+) tokens", str(error))[1]) < count


def test_the_server_answers_others_while_a_prompt_is_tokenised(model, monkeypatch):
    go_on, begun, encode = threading.Event(), threading.Event(), Tokenizer.encode

    def slow(self, *arguments, **options):
        begun.set()
        go_on.wait()
        return encode(self, *arguments, **options)

    async def ask():
        app = create_app(luban.Engine(model))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client,
        ):
            monkeypatch.setattr(Tokenizer, "encode", slow)
            waiting = asyncio.create_task(client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1}))
            await asyncio.to_thread(begun.wait)
            health = await client.get("/health")
            ids = await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 2, "ignore_eos": True})
            done_before = waiting.done()
            go_on.set()
            return health.status_code, ids.status_code, done_before, (await waiting).status_code

    assert asyncio.run(ask()) == (200, 200, False, 200)


# Memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paged", "n", "refused", "taken", "message"),
    [(False, 4, 20, 19, "4 × 26 tokens .* ask for fewer answers"), (True, 1, 91, 90, "97 tokens .* ask for a smaller")],
)
def test_a_request_that_would_never_fit_is_refused_with_the_sizes(model, paged, n, refused, taken, message):
    """100 tokens in a contiguous cache; 6 blocks of 16 in pages, where continuations needn't fit together."""
    engine = luban.Engine(model, cache_bytes=slots(model, 100), paged=paged)
    assert engine.budget.slots == (96 if paged else 100)
    with pytest.raises(RequestTooLarge, match=message):
        engine.generate([[5] * 6], Sampling(n=n, max_tokens=refused))
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        body = {"prompt": [5] * 6, "n": n, "ignore_eos": True}
        answer = client.post("/v1/completions", json={**body, "max_tokens": refused})
        assert answer.status_code == 422 and message[:6] in answer.json()["error"]["message"]
        for count in (n, 4):
            answer = client.post("/v1/completions", json={**body, "n": count, "max_tokens": taken})
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == count * taken


@pytest.mark.parametrize("paged", [True, False])
def test_requests_wait_until_their_memory_is_free_and_get_what_they_get_alone(model, paged):
    rng = random.Random()
    settings = [(rng.randrange(1, 20), rng.randrange(1, 20), rng.choice([1, 1, 2])) for _ in range(12)]
    asked = [
        (
            [rng.randrange(3, model.spec.vocab_size) for _ in range(size)],
            Sampling(max_tokens=n, n=k, temperature=0, ignore_eos=True),
        )
        for size, n, k in settings
    ]
    engine = luban.Engine(model, cache_bytes=slots(model, 120), paged=paged)
    requests = [Request(*each) for each in asked]
    for request in requests:
        engine.submit(request)
    together = 0
    while engine.step():
        running = engine.batch.sequences
        together = max(together, len(running))
        if running and not paged:
            assert len(running) * max(map(len, running)) <= 120
    assert together > 1
    for request, each in zip(requests, asked, strict=True):
        alone = luban.Engine(model, paged=False).generate([each[0]], each[1])[0]
        assert request.error is None
        assert [c.token_ids for c in request.result.choices] == [c.token_ids for c in alone.choices]


@pytest.mark.parametrize("paged", [True, False])
def test_a_prompt_whose_reading_fails_fails_alone(model, monkeypatch, paged):
    prefill, run = Session._prefill, ModelRunner.run

    def exhausted(self, prompts):
        if max(map(len, prompts)) > 30:
            raise MemoryError("no memory")
        return prefill(self, prompts)

    def exhausted_run(self, chunks, inspect=None):
        if max(chunk.count for chunk in chunks) > 30:
            raise MemoryError("no memory")
        return run(self, chunks, inspect)

    monkeypatch.setattr(Session, "_prefill", exhausted)
    monkeypatch.setattr(ModelRunner, "run", exhausted_run)
    engine, sampling = luban.Engine(model, paged=paged), Sampling(max_tokens=5, temperature=0, ignore_eos=True, n=2)
    first = Request([9], Sampling(max_tokens=9, temperature=0, ignore_eos=True))
    engine.submit(first)
    engine.step()
    requests = [Request([5] * size, sampling) for size in (3, 40, 4)]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    assert [type(request.error) for request in requests] == [type(None), MemoryError, type(None)]
    assert [len(request.result.token_ids) for request in (first, requests[0], requests[2])] == [9, 5, 5]
    if paged:
        assert engine.batch.scheduler.manager.free == engine.batch.runner.cache.blocks


@pytest.mark.parametrize("paged", [True, False])
def test_answers_without_a_limit_are_as_long_as_memory_allows(model, paged):
    engine = luban.Engine(model, cache_bytes=slots(model, 64), paged=paged)
    with TestClient(create_app(engine), base_url=LOCAL) as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "ignore_eos": True}
        for n in (1, 2):
            usage = client.post("/v1/chat/completions", json={**body, "n": n}).json()["usage"]
            whole = n * 64 if paged else 64  # continuations that don't fit together run in turn
            assert usage["completion_tokens"] == whole - n * usage["prompt_tokens"]


def test_the_budget_is_half_of_what_is_free(model, monkeypatch):
    monkeypatch.setattr("luban.serve.memory.free_memory", lambda device: slots(model, 1000))
    assert ContiguousBudget.of(model.module).slots == 500 and GROW < 500
    assert PagedBudget.of(model.module, max_sequences=9, max_tokens=10).slots == 496
    assert PagedBudget.of(model.module, max_sequences=9, max_tokens=10, block_size=50).slots == 500


def test_a_cache_that_holds_no_block_is_refused(model):
    least = slots(model, 16)
    with pytest.raises(ConfigError, match=r"hold no block of 16 tokens, which takes .*: give a larger --cache-gb"):
        luban.Engine(model, cache_bytes=least - 1)
    assert luban.Engine(model, cache_bytes=least).budget.slots == 16


def test_the_pool_is_no_larger_than_its_sequences_could_use(model, monkeypatch):
    monkeypatch.setattr("luban.serve.memory.free_memory", lambda device: slots(model, 10**9))
    assert PagedBudget.of(model.module, max_sequences=3, max_tokens=10).slots == 3 * model.spec.context

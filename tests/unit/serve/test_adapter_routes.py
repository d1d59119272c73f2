"""The routes by which adapters come and go while a server runs."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from adapted_models import GREEDY, SPEC, prompts, write_adapted, write_adapter
from tiny_models import write_checkpoint

from luban import Engine, load_model
from luban.adapters.lora import LoRA


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model and three adapters for it."""
    return write_adapted(tmp_path_factory.mktemp("served"))


KEY = {"Authorization": "Bearer k"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def serving():
    """`serving(engine, **options)`: a client with the key of a server of it."""
    testing = pytest.importorskip("fastapi.testclient", reason="the HTTP interface (extra serve)")
    from luban.serve.api.app import ServerOptions, create_app

    def start(engine, **options):
        app = create_app(engine, ServerOptions(api_key="k", **{"more_adapters": True, **options}))
        return testing.TestClient(app, base_url="http://localhost", headers=KEY, raise_server_exceptions=False)

    return start


def test_routes_are_there_where_they_are_asked_for_alone(served, serving):
    base, made = served
    body = {"lora_name": "x", "lora_path": str(made["a"])}
    with serving(Engine(load_model(base), adapters=made), more_adapters=False) as client:
        assert client.post(LOAD, json=body).status_code == client.post(UNLOAD, json=body).status_code == 404
        assert LOAD not in client.get("/openapi.json").json()["paths"]
    with serving(Engine(load_model(base), more_adapters=True)) as client:
        for path in (LOAD, UNLOAD):
            assert client.post(path, json=body, headers={"Authorization": "Bearer other"}).status_code == 401
            described = client.get("/openapi.json").json()["paths"][path]["post"]
            assert described["requestBody"]["required"]
            assert "text/plain" in described["responses"]["200"]["content"]


def test_an_adapter_comes_answers_and_goes_over_http(served, serving):
    base, made = served
    engine, (text,) = Engine(load_model(base), more_adapters=True), prompts(1)
    asked = {"prompt": text, "model": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with serving(engine) as client:
        assert client.post("/v1/completions", json=asked).status_code == 404
        for name in ("a", "c"):
            answer = client.post(LOAD, json={"lora_name": "x", "lora_path": str(made[name])})
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'x' added successfully.")
            listed = client.get("/v1/models").json()["data"]
            assert [each["id"] for each in listed] == [engine.model.name, "x"] and listed[1][
                "parent"
            ] == engine.model.name
            wanted = Engine(load_model(base, adapter=made[name])).generate(text, GREEDY)[0].text
            assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == wanted
            answer = client.post(UNLOAD, json={"lora_name": "x", "lora_int_id": None})
            assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
            assert client.post("/v1/completions", json=asked).status_code == 404
        assert client.post(LOAD, json={"lora_name": "x", "lora_path": str(made["a"])}).status_code == 200
        again = {"lora_name": "x", "lora_path": str(made["b"])}
        assert client.post(LOAD, json=again).status_code == 400
        assert client.post(LOAD, json={**again, "load_inplace": True}).status_code == 200
        wanted = Engine(load_model(base, adapter=made["b"])).generate(text, GREEDY)[0].text
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == wanted


def test_an_answer_in_flight_ends_with_its_adapter(served, serving):
    """The removal comes between two of its tokens, and the name is refused from then on."""
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters={"x": made["a"]}, more_adapters=True), prompts(1)
    go, step, answers = threading.Event(), engine.step, []

    def two_steps_then_wait():
        steps.append(1)
        if len(steps) == 3:
            reached.set()
        if len(steps) > 2 and not removing.is_set():
            go.wait(30)
        return step()

    steps, reached, removing = [], threading.Event(), threading.Event()
    engine.step = two_steps_then_wait
    with serving(engine) as client:
        body = {"prompt": text, "model": "x", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
        asking.start()
        assert reached.wait(30)
        removal = threading.Thread(target=lambda: answers.append(client.post(UNLOAD, json={"lora_name": "x"})))
        removal.start()
        while not client.app.state.service.worker.calls_waiting:
            time.sleep(0.002)
        removing.set()
        go.set()
        removal.join()
        asking.join()
        assert client.post("/v1/completions", json=body).status_code == 404
    first, second = sorted(answers, key=lambda answer: "choices" not in answer.text)
    assert second.status_code == 200 and first.status_code == 200
    wanted = Engine(load_model(base, adapter=made["a"])).generate(text, GREEDY)[0].text
    assert first.json()["choices"][0]["text"] == wanted and not engine.adapters.held


def test_what_is_wrong_with_a_body_or_an_adapter_is_said(served, serving, tmp_path):
    base, made = served
    other = write_adapter(write_checkpoint(tmp_path / "other", SPEC, seed=6), LoRA(rank=2), tmp_path / "foreign")
    with serving(Engine(load_model(base), more_adapters=True)) as client:
        for path, body, status, said in (
            (LOAD, {"lora_name": "x"}, 400, "lora_path: Field required"),
            (LOAD, {"lora_name": "", "lora_path": "x"}, 400, "lora_name: "),
            (LOAD, {"lora_name": "x", "lora_path": "x", "rank": 1}, 400, "rank: "),
            (LOAD, {"lora_name": "x", "lora_path": str(tmp_path / "no")}, 400, "no does not exist"),
            (LOAD, {"lora_name": "x", "lora_path": str(other)}, 400, "trained over a model with weights_hash"),
            (LOAD, {"lora_name": "x", "lora_path": "a\0b"}, 400, "does not exist"),
            (LOAD, {"lora_name": "x", "lora_path": "/"}, 400, "/ holds no adapter"),
            (LOAD, {"lora_name": "x", "lora_path": "n" * 5000}, 400, "can't be read: File name too long"),
            (LOAD, {"lora_name": "\ud800", "lora_path": "x"}, 400, "lora_name: "),
            (UNLOAD, {"lora_name": "x"}, 404, "there is no adapter 'x'"),
            (UNLOAD, {}, 400, "lora_name: Field required"),
        ):
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == status and said in answer.json()["error"]["message"], (body, answer.text)
        assert len(client.get("/v1/models").json()["data"]) == 1
        client.app.state.service.draining = True
        assert client.post(LOAD, json={"lora_name": "x", "lora_path": str(made["a"])}).status_code == 503


def test_an_adapter_that_has_gone_from_the_disk_fails_its_requests_alone(served, serving, tmp_path):
    base, made = served
    gone = shutil.copytree(made["a"], tmp_path / "gone")
    with serving(Engine(load_model(base), adapters={"x": gone, "y": made["b"]}, max_adapters=1)) as client:
        body = {"prompt": prompts(1)[0], "max_tokens": 2}
        assert client.post("/v1/completions", json={**body, "model": "x"}).status_code == 200
        assert client.post("/v1/completions", json={**body, "model": "y"}).status_code == 200  # takes its place
        shutil.rmtree(gone)
        failed = client.post("/v1/completions", json={**body, "model": "x"})
        said = failed.json()["error"]["message"]
        assert failed.status_code == 500 and "gone" in said and "does not exist" in said and "model failed" not in said
        assert client.post("/v1/completions", json={**body, "model": "y"}).status_code == 200

"""Every request and program of the serving guide, run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("llguidance")

from fastapi.testclient import TestClient

import luban
from luban.serve.api.app import ServerOptions, create_app

GUIDE = (Path(__file__).parents[3] / "docs" / "SERVING.md").read_text(encoding="utf-8")
REQUESTS = re.findall(r"^POST (\S+)([^\n]*)\n```json\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
TOOLS = (
    "{{ tools | tojson }} <tool_call>{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return luban.Engine(luban.load_model(tiny_checkpoint))


@pytest.mark.parametrize(("route", "note", "body"), REQUESTS, ids=[f"{r[0]} {i}" for i, r in enumerate(REQUESTS)])
def test_requests_are_answered(engine, monkeypatch, route, note, body):
    if "tools" in note:
        monkeypatch.setattr(engine.model.tokenizer, "chat_template", TOOLS)
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        answer = client.post(route, json=json.loads(body))
        assert answer.status_code == 200, answer.text
        found = answer.json()
        for choice in found.get("choices", ()):
            text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
            if "structured_outputs" in body and choice["finish_reason"] == "stop":
                assert text in ("yes", "no") or re.fullmatch("[0-9-]{10}", text)


def test_every_route_is_named(engine):
    routes = {
        route.path.replace("{name:path}", "NAME")
        for route in create_app(engine, ServerOptions(more_adapters=True)).routes
    }
    assert {route for route in routes if not route.startswith("/page")} <= set(re.findall(r"`\w+ (/[^`]*)`", GUIDE))


def test_every_figure_is_named(engine):
    with TestClient(create_app(engine), base_url="http://localhost") as client:
        names = set(re.findall(r"^# TYPE (luban_\w+) (?!gauge\b.*_created)", client.get("/metrics").text, re.MULTILINE))
    assert {name for name in names if not name.endswith("_created")} == set(re.findall(r"`(luban_\w+)`", GUIDE))


def test_the_program_runs(engine, monkeypatch, capsys):
    (program,) = [code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "Engine" in code]
    monkeypatch.setattr(luban, "load_model", lambda *_, **__: engine.model, raising=False)
    exec(compile(program, "SERVING.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_flags_exist():
    from luban.cli import bench, generate, serve

    fields = {
        verb: set(module.Arguments.__dataclass_fields__)
        for verb, module in (("serve", serve), ("generate", generate), ("bench", bench))
    }
    for line in re.findall(r"^luban [^\n]+", GUIDE, re.MULTILINE):
        verb = line.split()[1]
        for flag in re.findall(r"--([a-z-]+)", line):
            assert flag.replace("-", "_") in fields[verb], line

"""`luban serve RUN --index INDEX` of a model of `luban rag train`, as a process."""

from __future__ import annotations

import json

import pytest
import warm
from rag_models import write_facts
from test_http import httpx, start, stop

from luban.retrieval.rag.train import train_rag

pytest.importorskip("fastapi")


def test_the_server_answers_as_the_command(tmp_path):
    train_rag(write_facts(tmp_path, two_sided=True), tmp_path / "rag")
    done = warm.command("rag", "ask", tmp_path / "index", tmp_path / "rag", "what is tin?", "--max-tokens", 6, "--json")
    right = json.loads(done.stdout)
    process, address, _ = start(tmp_path / "rag", "--index", str(tmp_path / "index"), "--port", "0")
    try:
        body = {"model": "rag", "messages": [{"role": "user", "content": "what is tin?"}], "max_tokens": 6}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=None).json()
    finally:
        stop(process)
    assert answer["choices"][0]["message"]["content"] == right["answer"] and answer["model"] == "rag"
    assert [row["text"] for row in answer["citations"]] == [row["text"] for row in right["citations"]]

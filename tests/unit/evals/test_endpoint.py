"""An endpoint as a model: what it says is scored, what goes wrong is asked again, counted, and never scored."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evals_shared import CHOICE, COLOURS, read_json, read_lines, write_task

from luban.core.errors import DataError, UnfinishedError, UnsupportedError, UsageError
from luban.evals.backends import http
from luban.evals.backends.endpoint import EndpointBackend
from luban.evals.backends.http import Connection
from luban.evals.requests import Failed, Roll, Score, Write
from luban.evals.run import EvalOptions, evaluate

SUMS = [{"q": f"{i}+1", "a": str(i + 1)} for i in range(6)]
SUM = {"prompt": "{{q}}", "target": "{{a}}", "kind": {"type": "generate", "metrics": ["equal"]}}


class Script(BaseHTTPRequestHandler):
    """Answers by `server.answer(body)`: a table, or (status, bytes), or a number of seconds to be silent."""

    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        """The models."""
        self._send(200, json.dumps({"data": [{"id": "scripted"}]}).encode())

    def do_POST(self):
        """What the script says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        found = self.server.answer(body)
        if isinstance(found, float):
            time.sleep(found)
            found = {}
        status, data = found if isinstance(found, tuple) else (200, json.dumps(found).encode())
        self._send(status, data)

    def _send(self, status, data):
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    made.asked, made.daemon_threads = [], True
    made.address = f"http://127.0.0.1:{made.server_port}/v1"
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def text(said, reason="stop"):
    return {"choices": [{"text": said, "finish_reason": reason}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def right(body):
    a, b = body["prompt"].split("+")
    return text(str(int(a) + int(b)))


def test_answers_are_scored_and_what_is_rubbish_is_asked_again(server, tmp_path):
    trouble = iter(
        [
            (500, b"busy"),
            (200, b"<html>"),
            {"choices": []},  # half an answer
            {"choices": [{"text": None, "finish_reason": "stop"}]},
            text("cut", None),
            (429, b""),
        ]
    )
    lock = threading.Lock()

    def answer(body):
        with lock:
            wrong = next(trouble, None)
        return right(body) if wrong is None else wrong

    server.answer = answer
    task = write_task(tmp_path, "sums", SUM, SUMS)
    found = evaluate(server.address, [task], tmp_path / "out", EvalOptions(tries=7))
    assert found.results["equal"]["value"] == 1 and found.results["equal"]["n"] == 6
    assert found.counts["retries"] == 6 and found.failed == 0
    assert read_json(tmp_path / "out" / "manifest.json")["figures"]["retries"] == 6
    assert all(body["model"] == "scripted" and body["temperature"] == 0 for body in server.asked)


def test_what_stays_unanswered_is_never_scored_and_asked_again_by_the_next_run(server, tmp_path):
    server.answer = lambda body: (503, b"down") if body["prompt"] in ("2+1", "4+1") else right(body)
    task = write_task(tmp_path, "sums", SUM, SUMS)
    with pytest.raises(UnfinishedError, match=r"2 of 6 items have no answer \(status 503: down \(2 tries\)\)"):
        evaluate(server.address, [task], tmp_path / "out", EvalOptions(tries=2))
    kept = tmp_path / "out.incomplete"
    assert read_json(kept / "results.json")["equal"] == {
        "value": 1.0,
        "interval": [1.0, 1.0],
        "n": 4,
        "better": "higher",
        "task": "sums",
        "metric": "equal",
    }
    broken = [row for row in read_lines(kept / "answers.jsonl") if row.get("error")]
    assert [row["item"] for row in broken] == ["2", "4"] and all(row["scores"] is None for row in broken)
    server.answer, server.asked[:] = right, []
    found = evaluate(server.address, [task], tmp_path / "out", EvalOptions(tries=2))
    assert sorted(body["prompt"] for body in server.asked) == ["2+1", "4+1"]
    assert found.results["equal"]["n"] == 6 and not kept.exists()


def test_a_server_that_is_silent_is_not_waited_for(server):
    server.answer = lambda body: 3.0
    backend = EndpointBackend(Connection(server.address, timeout=0.1, tries=2), model="x")
    (found,) = backend.respond([Write(prompt="q", max_tokens=4)])
    assert isinstance(found, Failed) and "time" in found.error.lower() and backend.counts["retries"] == 1


def test_a_wrong_key_or_route_ends_the_run_at_once(server, tmp_path):
    server.answer = lambda body: (401, b"no such key")
    task = write_task(tmp_path, "sums", SUM, SUMS)
    with pytest.raises(DataError, match="refuses: status 401: no such key"):
        evaluate(server.address, [task], tmp_path / "out", EvalOptions())
    with pytest.raises(UsageError, match="no address of a server"):
        Connection("http://")
    with pytest.raises(DataError, match="lists no models"):
        EndpointBackend(Connection("http://127.0.0.1:9", tries=1))


def test_chats_are_sent_as_messages(server, tmp_path):
    said = {"choices": [{"message": {"content": "1"}, "finish_reason": "length"}]}
    server.answer = lambda body: said
    task = write_task(tmp_path, "sums", SUM | {"description": "Add."}, SUMS[:2])
    found = evaluate(server.address, [task], tmp_path / "out", EvalOptions(chat="turns", shots=1))
    assert [m["role"] for m in server.asked[0]["messages"]] == ["system", "user", "assistant", "user"]
    assert [row["scores"]["equal"] for row in found.rows] == [1, 0] and found.rows[0]["finish_reason"] == "length"


def test_continuations_are_scored_from_echoed_log_probabilities(server, tmp_path):
    def answer(body):
        assert body["echo"] and body["logprobs"] == 1
        tokens, offsets, at = [], [], 0
        for piece in body["prompt"].replace(" ", "\0 ").split("\0"):
            tokens.append(piece)
            offsets.append(at)
            at += len(piece)
        tokens, offsets = [*tokens, "!"], [*offsets, at]
        logprobs = [None, *(-float(len(token)) for token in tokens[1:])]
        tops = [None, *({token: -float(len(token)), "?": -3.5} for token in tokens[1:])]
        return {
            "choices": [
                {
                    "logprobs": {
                        "tokens": tokens,
                        "token_logprobs": logprobs,
                        "text_offset": offsets,
                        "top_logprobs": tops,
                    }
                }
            ]
        }

    server.answer = answer
    task = write_task(tmp_path, "colours", CHOICE, COLOURS)
    found = evaluate(server.address, [task], tmp_path / "out", EvalOptions())
    first = found.rows[0]["choices"]
    assert [c["logprob"] for c in first] == [-6.0, -4.0]  # " green", " red"
    backend = EndpointBackend(Connection(server.address))
    greedy, not_greedy = backend.respond(
        [Score(context="a", continuation=" b"), Score(context="a", continuation=" long")]
    )
    assert greedy.greedy and not not_greedy.greedy
    for request in (Roll(text="x"), Score(context="", continuation="x"), Score(context=[], continuation="x")):
        with pytest.raises(UnsupportedError, match="local model"):
            backend.respond([request])

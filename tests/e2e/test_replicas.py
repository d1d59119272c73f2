"""Several replicas behind one address: one guard, conversations that stay, one that is killed, and the end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
KEY = "k-ey"
AUTH = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def front(tiny_checkpoint):
    """(process, address) of two replicas."""
    words = ["serve", str(tiny_checkpoint), "--replicas", "2", "--port", "0", "--api-key", KEY, "--max-queue", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "luban", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"at (http://\S+)  \(2 replicas", line):
            threading.Thread(target=lambda: said.extend(process.stderr), daemon=True).start()
            wait(found[1], lambda states: states == ["ready", "ready"])
            yield process, found[1], said
            break
    else:
        raise AssertionError("".join(said))
    process.kill()
    process.wait()


def wait(address, fine):
    while not fine(httpx.get(f"{address}/health", timeout=60).json()["replicas"]):
        time.sleep(0.1)


def chat(*messages, **fields):
    told = [{"role": "user", "content": message} for message in messages]
    return {"model": "tiny-bytes", "messages": told, "max_tokens": 8, "temperature": 0, **fields}


def test_one_guard_and_the_api_of_one_server(front):
    _, address, _ = front
    assert httpx.get(f"{address}/health").json() == {"status": "ok", "replicas": ["ready", "ready"]}
    assert httpx.post(f"{address}/v1/chat/completions", json=chat("hi")).status_code == 401
    refused = httpx.get(f"{address}/v1/models", headers={**AUTH, "Host": "evil.example"})
    assert refused.status_code == 403
    with httpx.Client(base_url=address, headers=AUTH, timeout=60) as client:
        listed = client.get("/v1/models")
        assert listed.json()["data"][0]["id"] == "tiny-bytes"
        once = {"date", "server", "content-type", "content-length", "x-request-id", "luban-replica"}
        assert sorted(name.decode().lower() for name, _ in listed.headers.raw) == sorted(once)
        assert "Luban" in client.get("/").text
        assert client.post("/v1/chat/completions", json=chat("hi", temperature=-1)).status_code == 400
        assert client.get("/nowhere").status_code == 404
        metrics = client.get("/metrics").text
        assert 'replica="0"' in metrics and 'replica="1"' in metrics
        described = [line for line in metrics.splitlines() if line.startswith("# TYPE")]
        assert len(described) == len(set(described))


def test_a_body_that_is_too_large_is_refused_before_it_is_read(front):
    connection = http.client.HTTPConnection(urlsplit(front[1]).netloc, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    for header, value in {**AUTH, "Content-Length": str(65 * 2**20)}.items():
        connection.putheader(header, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_conversations_stay_and_others_are_spread(front):
    _, address, _ = front
    with httpx.Client(base_url=address, headers=AUTH, timeout=60) as client:
        for question in ("abc", "xyz"):
            places, told = set(), [question]
            for turn in range(3):
                answer = client.post("/v1/chat/completions", json=chat(*told))
                assert answer.status_code == 200
                places.add(answer.headers["luban-replica"])
                told.append(f"{turn}")
        answers = []
        threads = [
            threading.Thread(
                target=lambda i=i: answers.append(
                    httpx.post(f"{address}/v1/chat/completions", json=chat(f"{i} word " * 9), headers=AUTH, timeout=60)
                )
            )
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} <= {200, 429}
        assert len({answer.headers["luban-replica"] for answer in answers}) == 2


def children(process) -> list[int]:
    """Process ids of the replicas, in the order of their start."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = stat.parent.name, stat.read_text().rpartition(")")[2].split()
            if int(rest[1]) == process.pid and rest[0] != "Z":
                found.append(int(pid))
    return sorted(found)


def test_a_killed_replica_costs_its_own_answers_and_comes_back(front):
    process, address, said = front
    long = chat("a", max_tokens=60, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=long, headers=AUTH, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        number = int(answer.headers["luban-replica"])
        before = children(process)
        os.kill(before[number], signal.SIGSTOP)  # so that it doesn't end before it is killed
        os.kill(before[number], signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    last = json.loads(rest[-1].removeprefix("data: "))
    assert last["error"]["code"] == "replica_lost" and "send the request again" in last["error"]["message"]
    again = httpx.post(f"{address}/v1/chat/completions", json=chat("a"), headers=AUTH, timeout=60)
    assert again.status_code == 200 and again.headers["luban-replica"] == str(1 - number)
    wait(address, lambda states: states == ["ready", "ready"])
    assert any(f"replica {number} ended with exit code -9, and is started again" in line for line in said)
    assert set(before) & set(children(process)) == {before[1 - number]}


def test_sigterm_lets_answers_end(front):
    process, address, _ = front
    long = chat("a", max_tokens=40, ignore_eos=True, stream=True)
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=long, headers=AUTH, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(60) == 0 and not children(process)

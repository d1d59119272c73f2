"""A server whose model is divided among two processes: its answers, one of the two killed, and the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import luban

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "LUBAN_SERVE_PLAN_TENSOR": "2"}
LONG = {"prompt": "ab", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}


class Server:
    """A running server, its address and what it has said so far."""

    def __init__(self, model: Path):
        words = [sys.executable, "-m", "luban", "serve", str(model), "--port", "0"]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"serving .*? at (http://\S+)", line):
                self.address = found[1]
                break
        else:
            raise AssertionError("".join(self.said))
        self._reading = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self._reading.start()

    def others(self) -> list[int]:
        """The processes that it has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

    def end(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        code = self.process.wait(30)
        self._reading.join(30)
        return code, "".join(self.said)


@pytest.fixture
def server(tiny_checkpoint):
    running = Server(tiny_checkpoint)
    yield running
    running.process.kill()
    running.process.wait()


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]


def gone(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(map(is_there, pids)):
            return True
        time.sleep(0.1)
    return False


def test_answers_are_those_of_one_process_and_a_terminated_server_lets_them_end(server, tiny_checkpoint):
    alone = luban.Engine(luban.load_model(tiny_checkpoint))
    sampling = luban.Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    (other,) = server.others()
    os.kill(other, signal.SIGTERM)  # as to all processes of a service; the first one decides
    refused = httpx.post(f"{server.address}/v1/embeddings", json={"input": "ab"}, timeout=None)
    assert refused.status_code == 400 and "plan.tensor" in refused.json()["error"]["message"]
    text = ""
    with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG, timeout=None) as response:
        lines = (line for line in response.iter_lines() if line)
        first = next(lines)
        server.process.terminate()
        for line in (first, *lines):
            if "[DONE]" not in line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    code, said = server.end()
    assert code == 0 and "Traceback" not in said and gone([other])
    assert text == alone.generate("ab", sampling)[0].text


def test_a_server_that_loses_a_process_ends_and_says_so(server):
    (other,) = server.others()
    began = time.monotonic()
    with httpx.stream("POST", f"{server.address}/v1/completions", json=LONG, timeout=None) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(other, signal.SIGKILL)
        assert "error" in [line for line in lines if line][-1]
    code, said = server.end()
    assert code == 1 and time.monotonic() - began < 20
    assert "process 1 of 2 of the model ended" in said and "Traceback" not in said


@pytest.mark.slow
def test_the_other_processes_end_with_a_server_that_is_killed(server):
    others = server.others()
    server.process.kill()
    assert gone(others)

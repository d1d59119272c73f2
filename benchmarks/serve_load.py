"""Many streaming clients of one server: whether any is dropped, latency percentiles, and whether memory stays flat.

    python benchmarks/serve_load.py [smollm2] [--clients 200] [--minutes 30] [--flags --dtype int8]

Starts `luban serve MODEL` in a process of its own. Every client sends one request after the other until the time is over:
prompts of 8 to 200 words, answers of 8 to 64 tokens, streamed. One client in 20 reads slowly (a pause after each piece),
one in 20 leaves in the middle of its answer. At the end the server gets SIGTERM and must end by itself. Printed: requests by
how they ended, time to the first token and between tokens (p50, p95, p99), tokens a second, and the server's resident memory
in every tenth of the time. The exit code is 1 where a client was dropped.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from luban.serve.bench.measure import percentiles

ADDRESS = re.compile(r"serving .*? at (http://\S+)")
WORDS = ["the", "of", "and", "a", "to", "in", "is", "it", "was", "for", "on", "with"]
PAUSE = 0.2  # seconds after each piece that a slow client reads
TIMEOUT = 1800.0  # seconds without a byte


class Load:
    """What clients do and have seen.

    Args:
        address: of the server. model: its name. until: end of the test on `time.monotonic`'s clock.
    """

    def __init__(self, address: str, model: str, until: float):
        self.address, self.model, self.until = urlsplit(address), model, until
        self.lock = threading.Lock()
        self.ended: Counter[str] = Counter()
        self.first: list[float] = []  # seconds
        self.gaps: list[float] = []
        self.pieces = 0

    def client(self, number: int) -> None:
        """One client's requests."""
        rng = random.Random(number)
        while time.monotonic() < self.until:
            try:
                how = self._request(rng, slow=number % 20 == 1, leaves=number % 20 == 2)
            except (OSError, http.client.HTTPException, ValueError) as error:
                how = f"dropped: {type(error).__name__}"
            with self.lock:
                self.ended[how] += 1

    def _request(self, rng: random.Random, *, slow: bool, leaves: bool) -> str:
        """Send one and read its answer; returns how it ended."""
        prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(8, 200)))
        body = {"model": self.model, "prompt": prompt, "max_tokens": rng.randrange(8, 65), "stream": True}
        connection = http.client.HTTPConnection(self.address.hostname or "", self.address.port, timeout=TIMEOUT)
        sent = last = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            return f"status {answer.status}"
        pieces = 0
        for line in answer:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                connection.close()
                return "answered"
            if not data:
                continue
            if b'"error"' in data:
                return "dropped: error in the stream"
            now, pieces = time.perf_counter(), pieces + 1
            with self.lock:
                self.pieces += 1
                if pieces == 1:
                    self.first.append(now - sent)
                elif not slow:
                    self.gaps.append(now - last)
            last = now
            if leaves and pieces == 4:
                connection.close()
                return "left by the client"
            if slow:
                time.sleep(PAUSE)
        return "dropped: the stream broke off"


def resident_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def line(name: str, seconds: list[float]) -> str:
    """Percentiles, in milliseconds."""
    return f"{name:20}" + "  ".join(f"p{p} {value:9.1f} ms" for p, value in percentiles(seconds).items())


def main() -> int:
    """Run the load and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of luban serve; the last argument")
    args = parser.parse_args()
    command = [sys.executable, "-m", "luban", "serve", args.model, "--port", "0", *args.flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "LUBAN_API_KEY": ""})
    assert server.stderr is not None
    address = next((found[1] for line in server.stderr if (found := ADDRESS.search(line))), None)
    if address is None:
        raise SystemExit(f"the server of {args.model} ended before it was ready")
    threading.Thread(target=server.stderr.read, daemon=True).start()
    connection = http.client.HTTPConnection(urlsplit(address).hostname or "", urlsplit(address).port)
    connection.request("GET", "/v1/models")
    model = json.loads(connection.getresponse().read())["data"][0]["id"]
    began = time.monotonic()
    load = Load(address, model, began + 60 * args.minutes)
    clients = [threading.Thread(target=load.client, args=(number,), daemon=True) for number in range(args.clients)]
    for client in clients:
        client.start()
    memory = []
    for tenth in range(1, 11):
        time.sleep(max(0.0, began + 6 * args.minutes * tenth - time.monotonic()))
        memory.append(resident_mb(server.pid))
    for client in clients:
        client.join()
    seconds = time.monotonic() - began
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    print(f"{args.clients} clients, {seconds:.0f} s, {dict(load.ended)}, {load.pieces / seconds:.1f} pieces/s")
    print(line("first token", load.first))
    print(line("between tokens", load.gaps))
    print("resident memory, MB: " + " ".join(f"{value:.0f}" for value in memory) + f"; server's exit code {code}")
    return int(any(how not in ("answered", "left by the client") for how in load.ended))


if __name__ == "__main__":
    raise SystemExit(main())

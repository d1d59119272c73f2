"""Starts the processes of a run on this machine, and ends them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from luban.core.log import say

GRACE = 10.0  # seconds that the others get to end by themselves after one has failed, and again after they were told to
POLL = 0.1  # seconds
BROUGHT_DOWN = 1  # exit code of a process that ends because another is lost
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(words: Sequence[str], processes: int) -> int:
    """Run `luban WORDS` as so many processes that find each other, as torchrun would start them. Returns the exit code.

    When one fails the others are ended, and the failed one is named. Ctrl-C, SIGTERM and SIGHUP reach all of them.
    """
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1))),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "luban", *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # signals of the terminal come through us, once each
        )
        for rank in range(processes)
    ]
    before = {number: signal.signal(number, _forward_to(started)) for number in FORWARDED}
    try:
        return _wait(started)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward_to(started: Sequence[subprocess.Popen]):
    def forward(number: int, _frame) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    return forward


def _wait(started: Sequence[subprocess.Popen]) -> int:
    """Until all have ended. The exit code is that of the one that failed first."""
    failed: int | None = None
    left: list[int] = []  # those that did not end by themselves after it
    told = 0  # how often they were told to end
    since = 0.0
    while any(process.poll() is None for process in started):
        codes = [process.poll() for process in started]
        now = time.monotonic()
        if failed is None and any(codes):
            failed, since = _first(codes), now
        elif failed is not None and now - since > GRACE:
            left = left or [rank for rank, code in enumerate(codes) if code is None]
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL if told else signal.SIGTERM)
            told, since = told + 1, now
        time.sleep(POLL)
    codes = [process.returncode for process in started]
    if not any(codes):
        return 0
    failed = _first(codes) if failed is None else failed
    code = codes[failed] if codes[failed] > 0 else 128 - codes[failed]
    if left and code == BROUGHT_DOWN:
        named = ", ".join(map(str, left))
        say(f"luban: of {len(started)} processes {named} did not end by itself when the others had, and was killed")
    elif told or len(set(codes)) > 1:
        say(f"luban: process {failed} of {len(started)} failed with exit code {code}, which ended the others")
    return code


def _first(codes: Sequence[int | None]) -> int:
    """Of the processes that have failed, one that wasn't brought down by another."""
    return min((code == BROUGHT_DOWN, rank) for rank, code in enumerate(codes) if code)[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

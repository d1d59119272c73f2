"""A process that sends no heartbeat is named, and one that has ended properly is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from luban.parallel.heartbeat import TAKEN, Heart, watched

BEAT, SILENT = 0.02, 0.5
WAIT = 20.0


@pytest.fixture
def store():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=WAIT), wait_for_workers=False)


class Left:
    """Messages of processes that ended."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.event = threading.Event()

    def __call__(self, message: str) -> None:
        self.messages.append(message)
        self.event.set()


def watch(store, rank: int, left: Left, size: int = 3):
    return watched(store, rank, size, leave=left, beat=BEAT, silent=SILENT)


def test_the_others_name_a_process_that_never_answers(store):
    first, second = Left(), Left()
    with watch(store, 0, first), watch(store, 1, second):
        assert first.event.wait(WAIT) and second.event.wait(WAIT)
    for found in (first, second):
        assert len(found.messages) == 1 and "process 2 of 3 has sent no heartbeat" in found.messages[0]


def test_the_others_name_the_first_process(store):
    left = Left()
    with watch(store, 1, left, size=2):
        assert left.event.wait(WAIT)
    assert "process 0 of 2" in left.messages[0]


STORE = """
import sys
from datetime import timedelta
import torch.distributed as dist
kept = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(minutes=10), wait_for_workers=False)
print(kept.port, flush=True)
sys.stdin.read()
"""


def test_the_others_name_the_first_process_when_the_store_stops_with_it():
    """The store doesn't refuse then: it never answers."""
    first = subprocess.Popen([sys.executable, "-c", STORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        port = int(first.stdout.readline())
        store, left = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(minutes=10)), Left()
        store.set("alive/0", "1")
        with watch(store, 1, left, size=2):
            time.sleep(3 * BEAT)
            assert not left.messages
            os.kill(first.pid, signal.SIGSTOP)
            assert left.event.wait(WAIT)
        assert len(left.messages) == 1 and "process 0 of 2 has sent no heartbeat" in left.messages[0]
    finally:
        first.kill()
        first.communicate()


def test_a_process_that_has_ended_is_not_missed(store):
    left = Left()
    with watch(store, 0, left, size=2):
        with watch(store, 1, left, size=2):
            time.sleep(3 * BEAT)
        time.sleep(2 * SILENT)
    assert not left.messages


def test_time_in_which_this_process_was_stopped_is_nobodys_silence(store):
    """All processes are suspended together (a container that is paused), and this one is the first that goes on."""
    heart = Heart(store, 0, 2, Left(), 1.0, 3.0)
    store.set("alive/1", "7")
    assert heart.look_around() is None
    for _ in range(3):  # beats; however much time lies between them
        assert heart.look_around() is None
    assert heart.look_around() == 1
    store.set("alive/1", "8")
    assert heart.look_around() is None


def test_the_first_process_waits_until_the_others_have_read_what_it_found(store):
    """The store ends with it, and they would name it then."""
    waited: list[tuple[float, bool]] = []

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append((timeout or 0.0, store.check(["lost"])))
            return False

    found = Left()
    heart = Heart(store, 0, 2, found, 1.0, 5.0)
    heart.stop = Waits()
    heart.run()
    assert "process 1 of 2" in found.messages[0] and store.get("lost") == b"1"
    assert waited[-1] == (TAKEN * 1.0, True) and not any(told for _, told in waited[:-1])


def test_one_process_needs_no_watch():
    with watched(None, 0, 1):
        pass

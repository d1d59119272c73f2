"""A process that is stuck is named with where it stands, and slow ones aren't taken for stuck."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import pytest

from luban.parallel.standstill import PATIENCE, Judge, Observer, Standing, main_stack, position_of, report

HANG = 60.0
FREE = Standing(step=3, doing="compute", still=0.0, where="a.py:1 in f", waits=False, excused=False)
WAITS = replace(FREE, waits=True)


def still(seconds: float, *standings: Standing) -> dict[int, Standing]:
    return {rank: replace(one, still=seconds) for rank, one in enumerate(standings)}


def test_those_that_do_not_wait_are_stuck_once_nobody_gets_on():
    judge = Judge(3, HANG)
    assert judge.stuck(still(HANG, WAITS, FREE, WAITS)) == []
    assert judge.stuck(still(HANG + 1, WAITS, FREE, WAITS)) == [1]
    assert Judge(3, HANG).stuck(still(HANG + 1, WAITS, WAITS, WAITS)) == [0, 1, 2]  # a message was lost


@pytest.mark.parametrize(
    "changed",
    [
        {"still": HANG - 1},  # another process gets on
        {"excused": True},  # compiles, or writes a checkpoint
        {"step": None},  # nobody knows how long a step takes
    ],
)
def test_a_run_with_one_process_that_gets_on_is_not_stuck(changed):
    standings = still(10 * HANG, WAITS, FREE)
    assert Judge(2, HANG).stuck({**standings, 0: replace(standings[0], **changed)}) == []
    assert Judge(2, HANG).stuck({1: standings[1]}) == []  # the other has said nothing yet
    assert Judge(2, HANG).stuck(standings) == [1]


def test_pauses_as_they_were_before_are_waited_for():
    """Also that of the first step, in which nobody is named."""
    pause = random.Random(time.time_ns()).uniform(HANG / PATIENCE, 3 * HANG)
    judge, first = Judge(2, HANG), [replace(one, step=None) for one in (WAITS, FREE)]
    for seconds in (pause / 2, pause):
        assert judge.stuck(still(seconds, *first)) == []
    assert judge.stuck(still(0.0, WAITS, FREE)) == []
    assert judge.stuck(still(PATIENCE * pause, WAITS, FREE)) == []
    assert judge.stuck(still(PATIENCE * pause + 1, WAITS, FREE)) == [1]


def test_the_report_lists_the_stuck_one_first():
    lines = report(still(61.0, WAITS, replace(FREE, where="loader.py:7 in read"), WAITS), [1]).splitlines()
    assert "process 1 of 3 is stuck" in lines[0] and "61 seconds" in lines[0]
    assert "process 1, compute behind step 3: loader.py:7 in read" in lines[1]


@dataclass
class Doing:
    doing: str = "compute"
    since: float = 0.0
    step: int | None = 1


def spin(stop: threading.Event, box: list) -> None:
    box.append(sys._getframe())
    while not stop.is_set():
        pass


def test_a_loop_stands_still_and_another_step_or_call_does_not(monkeypatch):
    stop, box, activity = threading.Event(), [], Doing()
    thread = threading.Thread(target=spin, args=(stop, box))
    thread.start()
    frames = sys._current_frames
    monkeypatch.setattr("luban.parallel.standstill.main_frame", lambda: frames().get(thread.ident))
    try:
        while not box:
            time.sleep(0.001)
        observer = Observer(activity, 1.0)
        deadline = time.monotonic() + 20
        while observer.look().still < 3:  # each of the few calls of the loop has been seen
            assert time.monotonic() < deadline
        standing = observer.look()
        assert "test_standstill.py" in standing.where and "in spin" in standing.where and not standing.waits
        activity.step = 2
        assert observer.look().still == 0
    finally:
        stop.set()
        thread.join()
    monkeypatch.setattr("luban.parallel.standstill.main_frame", sys._getframe)
    assert observer.look().still == 0  # elsewhere
    assert Observer(Doing(doing="checkpoint"), 1.0).look().excused
    assert Observer(Doing(doing="communication"), 1.0).look().waits


def test_a_thread_in_a_collective_waits_and_one_in_a_compiler_is_known():
    def frame(path: str, source: str):
        box: dict = {"sys": sys}
        exec(compile(source, path, "exec"), box)
        return box["found"]

    waiting = frame("/x/site-packages/torch/distributed/distributed_c10d.py", "found = sys._getframe()")
    assert position_of(waiting).waits and not position_of(waiting).compiles
    compiling = frame("/x/site-packages/torch/_inductor/graph.py", "found = sys._getframe()")
    assert position_of(compiling).compiles and not position_of(compiling).waits
    assert not position_of(sys._getframe()).waits


def test_an_instruction_without_a_line_has_a_position(monkeypatch):
    """Python leaves out the lines of some; the heartbeat must not end with one."""
    box: dict = {"sys": sys}
    exec(compile("found = sys._getframe()", "/x/unknown.py", "exec").replace(co_linetable=b""), box)
    assert box["found"].f_lineno is None
    found = position_of(box["found"])
    assert "unknown.py" in found.where and not found.waits
    monkeypatch.setattr("luban.parallel.standstill.main_frame", lambda: box["found"])
    assert "unknown.py" in main_stack()


CHILD = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from luban.parallel.heartbeat import watched
from luban.train.goodput import Goodput

rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(minutes=10), wait_for_workers=False)
dist.init_process_group("gloo", store=dist.PrefixStore("c", store), rank=rank, world_size=2)

def endless_loop():
    while True:
        pass

goodput = Goodput()
with watched(store, rank, 2, activity=goodput, hang=0.5, beat=0.05):
    for step in range(1, 4):
        goodput.enter("compute")
        dist.all_reduce(torch.ones(3))
        goodput.step = step
        time.sleep(0.1)
    if rank == 1:
        endless_loop()
    dist.all_reduce(torch.ones(3))
"""


def test_a_process_in_an_endless_loop_ends_the_run_and_is_named_with_its_stack():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-c", CHILD]
    both = [subprocess.Popen([*words, str(rank), str(port)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        first, second = (process.communicate(timeout=120)[1] for process in both)
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [1, 1]
    assert "process 1 of 2 is stuck, and the others wait" in first, first
    assert "process 1, compute behind step 3" in first and "in endless_loop" in first, first
    assert "process 1 of 2 is stuck here" in second and "in endless_loop" in second, second

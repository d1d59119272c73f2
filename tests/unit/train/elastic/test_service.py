"""The service of a run as its agents and workers use it: what it notices, and what survives when it is killed."""

from __future__ import annotations

from copy import deepcopy

import pytest
from clock import Clock

from luban.core.plan import ParallelPlan
from luban.train.elastic.events import in_words
from luban.train.elastic.service import FAILURE_SECONDS, MOST_EVENTS, MOST_FAILURES, Service, ServiceSettings
from luban.train.elastic.wire import StaleGeneration

SILENT, HANG = 10.0, 100.0
SETTINGS = ServiceSettings(
    plan=ParallelPlan(replicate=4),
    batch_size=8,
    min_workers=1,
    join_seconds=30,
    silent_seconds=SILENT,
    hang_seconds=HANG,
    balance=False,
    host="127.0.0.1",
)
WORKERS = ("a/0", "a/1", "b/0", "b/1")


class Run:
    """A service with two nodes of two workers each, in a generation."""

    def __init__(self, path):
        self.path, self.clock = path, Clock()
        self.service = Service(path, SETTINGS, self.clock, self.clock)
        for node in ("a", "b"):
            self("status", since=0, node=node)
            self("node", name=node, numbers=[0, 1])
        for name in WORKERS:
            self("join", name=name, incarnation=name, version={"luban": "1"}, after=0, pid=1, started="")
        self.beat()

    def __call__(self, operation: str, **fields):
        return self.service.operations[operation](**fields)

    def beat(self, *names: str, doing: str = "compute", for_seconds: float = 0.0):
        state = {"doing": doing, "for_seconds": for_seconds, "collectives": 0}
        return [self("beat", name=n, incarnation=n, generation=1, **state) for n in names or WORKERS]

    def said(self) -> list[str]:
        return [text for event in self("status", since=0, node="a")["events"] if (text := in_words(event))]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "service.db")


def test_members_are_told_when_their_generation_is_over(run):
    assert run.beat() == [{"current": True, "ended": None}] * 4
    run("publish", generation=1, key="store", value={"port": 1})
    assert run("published", generation=1, key="store") == {"port": 1}
    run("lost", name="b/1", incarnation="b/1", how="killed by SIGKILL")
    assert not run.beat("a/0")[0]["current"]
    with pytest.raises(StaleGeneration):
        run("published", generation=1, key="store")
    assert "worker b/1 is lost (killed by SIGKILL); the others keep running" in run.said()


def test_silent_and_hanging_workers_are_named(run):
    run.clock.advance(SILENT + 1)
    run.beat("a/0", "b/0", doing="communication", for_seconds=HANG + 1)
    run.beat("b/1", doing="data", for_seconds=HANG + 1)
    assert run("status", since=0, node="a")["unwell"] == {"a/1": "silent", "b/1": "hangs"}


def test_a_generation_whose_messages_were_lost_begins_again(run):
    run.beat(doing="communication", for_seconds=HANG + 1)
    assert run("status", since=0, node="a")["unwell"] == {}
    assert not run.beat("a/0")[0]["current"]


def test_a_machine_that_is_gone_is_told_from_a_lost_process_and_from_a_lost_agent(run):
    run.clock.advance(2 * SILENT + 1)
    run.beat()
    run("status", since=0, node="a")
    assert run("status", since=0, node="a")["nodes"] == ["a", "b"]  # b's agent is silent, its workers are not
    run.clock.advance(2 * SILENT + 1)
    run.beat("a/0", "a/1")
    assert run("status", since=0, node="a")["nodes"] == ["a"]
    assert "b fails: neither its agent nor its workers send heartbeats" in run.said()
    for name in ("a/0", "a/1"):
        run("join", name=name, incarnation=name, version={"luban": "1"}, after=1, pid=1, started="")
    assert run("assignment", name="a/1", incarnation="a/1", after=1)["workers"] == ["a/0", "a/1"]


def test_a_machine_whose_workers_fail_again_and_again_is_named(run):
    for number in range(MOST_FAILURES):
        assert run("status", since=0, node="b")["failing"] == []
        for _ in range(3):  # a request may arrive again
            run("lost", name="b/0", incarnation=f"{number}", how="exit code 1")
    assert run("status", since=0, node="b")["failing"] == ["b"]
    run("lost", name="a/0", incarnation="a/0", how="exit code 1")
    assert run("status", since=0, node="b")["failing"] == []
    run.clock.advance(FAILURE_SECONDS)
    assert run("status", since=0, node="b")["failing"] == []


def test_one_worker_is_no_workers(run):
    said = run.said()
    assert "b joins with 2 workers" in said and "generation 1: 4 workers" in said
    run("node", name="c", numbers=[3])
    assert run.said()[-1] == "c joins with 1 worker"
    begins = {"kind": "generation begins", "who": "", "detail": {"generation": 7, "workers": 1}}
    assert in_words(begins) == "generation 7: 1 worker"


def test_a_straggler_is_said_once(run):
    for step in range(15):
        run("lease", generation=1, step=step, rows=8, pieces=1)
        for rank, name in enumerate(WORKERS):
            seconds = 2.0 if name == "b/0" else 1.0
            report = {"generation": 1, "step": step, "rank": rank, "seconds": seconds, "ledger": {"compute": seconds}}
            run("done", name=name, incarnation=name, **report)
    assert run.said().count("worker b/0 is slow: its steps take 2.0 times those of the others") == 1
    assert run("figures")["stragglers"] == ["b/0"]


def test_the_first_end_counts_and_a_new_session_begins_where_nobody_is_left(run):
    run("end", code=1, message="first")
    run("end", code=0, message="second")
    assert run.beat("a/0")[0]["ended"] == {"code": 1, "message": "first"}
    run("begin", node="c")
    assert run("status", since=0)["ended"]  # workers are there
    run.clock.advance(SILENT + 1)
    run("begin", node="c")
    found = run("status", since=0)
    assert not found["ended"] and not found["nodes"] and not found["generation"]
    run(
        "join", name="c/0", incarnation="c", version={"luban": "2"}, after=0, pid=1, started=""
    )  # any version may begin


def test_machines_that_start_together_keep_each_others_workers(run):
    """The nodes of the session before are in the database; the workers of the first machine still import."""
    run.clock.advance(SILENT + 1)
    for _ in range(2):  # both agents look for the service before either begins
        run("status", since=0)
    run("begin", node="b")
    assert run("status", since=0)["nodes"] == []
    run("node", name="b", numbers=[0, 1])
    run.clock.advance(SILENT - 1)
    run("status", since=0, node="b")
    run("begin", node="a")
    run("node", name="a", numbers=[0, 1])
    assert run("status", since=0)["nodes"] == ["a", "b"]
    run.clock.advance(SILENT + 1)
    run("status", since=0, node="a")
    run("begin", node="a")  # b is silent, and a begins again
    assert run("status", since=0)["nodes"] == []


def test_a_service_that_has_just_started_again_wipes_no_run_whose_workers_it_has_not_heard(run):
    run("lease", generation=1, step=0, rows=8, pieces=1)
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    assert run("begin", node="c") == SILENT  # ask again then
    run.clock.advance(1)
    assert run("begin", node="c") == SILENT - 1
    assert run.beat("a/0")[0]["current"]  # wasn't lost
    assert run("begin", node="c") == 0  # a/0 was heard: the run goes on
    assert run("status", since=0)["nodes"] == ["a", "b"] and run.beat("b/0")[0]["current"]


def test_a_service_that_hears_nobody_after_its_start_begins_a_session(run):
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    assert run("begin", node="c")
    run.clock.advance(SILENT)
    assert run("begin", node="c") == 0
    assert run("status", since=0)["nodes"] == []


def test_nobody_waits_for_others_where_there_were_none_or_the_run_has_ended(run):
    run("end", code=143, message="stopped")
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    assert run("begin", node="c") == 0 and run("status", since=0)["ended"] is None
    run("node", name="c", numbers=[0])
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    assert run("begin", node="c") == 0 and run("status", since=0)["nodes"] == []


def test_a_new_run_in_the_same_place_has_accounts_of_its_own(run):
    report = {"generation": 1, "step": 0, "rank": 0, "seconds": 1.0, "ledger": {"compute": 5.0}}
    run("lease", generation=1, step=0, rows=8, pieces=1)
    run("done", name="a/0", incarnation="a/0", **report)
    run("lost", name="a/0", incarnation="a/0", how="killed")
    assert run("figures")["lost_workers"] == 1 and run("figures")["goodput"]["wall"] == 5
    for name in WORKERS:
        run("join", name=name, incarnation=name + "'", version={"luban": "1"}, after=0, pid=1, started="")
    run("run_begins", generation=2)
    found = run("figures")
    assert (found["lost_workers"], found["generations"], found["goodput"]["wall"]) == (0, 1, 0)


def test_seconds_of_the_run_without_the_service_are_kept(run):
    """The manifest's seconds go up while the run is trained without the service, and what was told is not counted twice."""
    assert run("figures")["goodput"]["wall"] == 0
    run("spent_before", recorded={"compute": 30.0, "idle": 5.0, "wall": 35.0})
    run("spent_before", recorded={"compute": 30.0, "idle": 5.0, "wall": 35.0})  # the next generation reads the same
    found = run("figures")["goodput"]
    assert found["compute"] == 30 and found["idle"] == 5 and found["wall"] == 35
    run.clock.advance(10)
    run.service.accounts.report("a/0", "a/0", {"compute": 8.0, "data": 2.0})
    told = run("figures")["goodput"]
    assert told["compute"] == 38 and told["wall"] == 45
    run("spent_before", recorded=told)
    run.service.accounts.begin_session()
    run("spent_before", recorded={**told, "compute": told["compute"] + 7})  # seven seconds without the service
    assert run("figures")["goodput"]["compute"] == 45 and run("figures")["goodput"]["wall"] == 52
    run("run_begins", generation=1)
    assert run("figures")["goodput"]["wall"] == 0


def test_a_killed_service_goes_on_where_it_was(run):
    run("lease", generation=1, step=0, rows=8, pieces=1)
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    assert run.beat("a/0")[0]["current"]
    assert run("lease", generation=1, step=0, rows=8, pieces=1)["bounds"] == [0, 2, 4, 6, 8]
    assert run("status", since=0, node="a")["unwell"] == {} and run("status", since=0)["step"] == 0


def test_a_machine_that_is_lost_while_the_service_restarts_ends_the_generation(run):
    run.service = Service(run.path, SETTINGS, run.clock, run.clock)
    run("status", since=0, node="a")
    run.clock.advance(2 * SILENT + 1)
    run.beat("a/0", "a/1")
    assert run("status", since=0, node="a")["nodes"] == ["a"]
    assert not run.beat("a/0")[0]["current"]
    assert run("figures")["lost_workers"] == 2


def test_requests_that_arrive_twice_change_nothing(run):
    def known():
        found = run("status", since=0)
        return found["events"], found["event_count"], run("figures"), run.service.rows.speeds, run.service.times.of

    report = {"generation": 1, "step": 0, "rank": 0, "seconds": 2.0, "ledger": {"compute": 5.0}}
    done = ("done", {"name": "a/0", "incarnation": "a/0", **report})
    requests = [
        ("run_begins", {"generation": 1}),
        ("resume", {"generation": 1, "step": 0}),
        ("lease", {"generation": 1, "step": 0, "rows": 8, "pieces": 1}),
        done,
        ("event", {"request": "x", "kind": "node fails", "who": "b", "why": "it is old"}),
        ("event", {"request": "y", "kind": "node fails", "who": "b", "why": "it is old"}),  # again, later
        ("lost", {"name": "b/1", "incarnation": "b/1", "how": "killed"}),
    ]
    for number, (operation, fields) in enumerate(requests):
        first, before = run(operation, **fields), deepcopy(known())
        for earlier, again in requests[: number + 1]:  # also late
            if operation != "lost" or earlier in ("lost", "event"):
                found = run(earlier, **again)
                assert earlier != operation or found == first
        assert known() == before
    kinds = [event["kind"] for event in known()[0]]
    assert [kinds.count(kind) for kind in ("run begins", "node fails", "lost", "generation ends")] == [1, 2, 1, 1]
    with pytest.raises(StaleGeneration):  # of a worker that was lost
        run("run_begins", generation=1)


def test_a_repeated_question_for_what_was_lost_has_the_same_answer(run):
    for step in range(3):
        run("lease", generation=1, step=step, rows=8, pieces=1)
    assert [run("resume", generation=1, step=1) for _ in range(2)] == [2, 2]
    run("lease", generation=1, step=1, rows=8, pieces=1)
    assert (
        run("resume", generation=1, step=1) == 2 and run("status", since=0)["step"] == 1
    )  # what was leased since stays


def test_events_come_in_parts(run):
    known = run("status", since=0)["event_count"]
    for number in range(MOST_EVENTS + 5):
        run("event", request="1", kind="noticed", who=str(number))
    assert run("status", since=0)["event_count"] == known + MOST_EVENTS + 5
    parts = [run("status", since=known + at)["events"] for at in (0, MOST_EVENTS)]
    assert [event["who"] for part in parts for event in part] == [str(number) for number in range(MOST_EVENTS + 5)]

"""Generations of workers: who takes part, with which rank; what a worker may ask at which moment."""

from __future__ import annotations

import random
import re

import pytest
from clock import Clock

from luban.train.elastic.database import Events, open_database
from luban.train.elastic.events import in_words
from luban.train.elastic.membership import Membership
from luban.train.elastic.wire import Refused, StaleGeneration

PATIENCE = 10.0


class Run:
    """A membership, and workers that join it."""

    def __init__(self, path, usable=lambda workers: workers, fewest=1):
        self.path, self.clock, self.settings = path, Clock(), (usable, fewest, PATIENCE)
        self.open()
        self.last: dict[str, int] = {}

    def open(self) -> None:
        """As the service does when it starts, also after it was killed."""
        database = open_database(self.path)
        self.members = Membership(database, Events(database, lambda: 0.0), *self.settings, self.clock)

    def join(self, *names: str, incarnation: str = "a", version: str = "1", **recipe) -> None:
        for name in names:
            self.members.join(
                name, incarnation, {"luban": version, "recipe": recipe}, self.last.get(name + incarnation, 0), 1, ""
            )

    def again(self, name: str) -> Run:
        """Another run beside this one."""
        other = Run(self.path.with_name(name))
        other.members.node("a", [0, 1])
        return other

    def assignments(self, *names: str, incarnation: str = "a") -> dict[str, int]:
        """Worker → rank of those that have a rank in a new generation."""
        found = {}
        for name in names:
            assignment = self.members.assignment(name, incarnation, self.last.get(name + incarnation, 0))
            if assignment and "rank" in assignment:
                self.last[name + incarnation] = assignment["generation"]
                found[name] = assignment["rank"]
        return found


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "service.db")


THREE = ("a/0", "a/1", "a/2")


def started(run: Run, names=THREE) -> None:
    run.members.node("a", list(range(len(names))))
    run.join(*names)
    assert run.assignments(*names) == {name: rank for rank, name in enumerate(names)}


def test_a_replacement_takes_the_rank_of_the_lost_worker(run):
    started(run)
    run.members.lost("a/1", "a", "killed")
    with pytest.raises(StaleGeneration, match="generation 1 is over"):
        run.members.require(1)
    run.join("a/0", "a/2")
    assert run.assignments(*THREE) == {}
    run.join("a/1", incarnation="b")
    assert run.assignments("a/0", "a/2") == {"a/0": 0, "a/2": 2} and run.assignments("a/1", incarnation="b") == {
        "a/1": 1
    }
    assert run.members.generation == 2


def test_the_others_go_on_when_nobody_replaces_it_in_time(run):
    started(run)
    run.members.lost("a/0", "a", "killed")
    run.join("a/1", "a/2")
    assert run.assignments("a/1", "a/2") == {}
    run.clock.advance(PATIENCE + 1)
    assert run.assignments("a/1", "a/2") == {"a/1": 1, "a/2": 0}  # who had a rank that there still is keeps it
    run.join("a/0", incarnation="b")  # late: it asks for a change, and members leave between two steps
    assert run.members.facts.get("change")
    run.join("a/1", "a/2")
    assert run.assignments("a/1", "a/2") == {"a/1": 1, "a/2": 0} and run.assignments("a/0", incarnation="b") == {
        "a/0": 2
    }


def test_a_killed_service_forgets_nothing(run):
    started(run)
    run.open()
    assert run.members.generation == 1 and [row["name"] for row in run.members.members()] == list(THREE)
    run.members.lost("a/2", "a", "killed")
    run.open()
    run.join("a/0", "a/1")
    run.open()
    run.join("a/2", incarnation="b")
    assert run.assignments("a/0", "a/1") == {"a/0": 0, "a/1": 1} and run.assignments("a/2", incarnation="b") == {
        "a/2": 2
    }


def test_requests_that_arrive_twice_change_nothing(run):
    started(run)
    run.last.clear()
    run.join(*THREE)  # as if the answers had been lost
    assert run.members.generation == 1 and run.members.running
    run.members.lost("a/1", "a", "killed")
    run.join("a/0", "a/2", "a/0")
    run.join("a/1", incarnation="b")
    run.members.lost("a/1", "a", "killed")  # late news of a process that has a successor
    assert run.members.generation == 2 and run.members.running


def test_a_worker_of_another_version_is_refused_by_name(run):
    started(run)
    said = "worker b/0 is refused, since it has another version than this run (luban is 2 instead of 1): start it from the same code"
    with pytest.raises(Refused, match=re.escape(said)):
        run.join("b/0", version="2")
    assert run.members.running


def test_every_field_that_differs_is_named_with_both_values(run):
    run.join("a/0", train={"seed": 7, "rates": (1, 2)}, data={"path": "x"})
    run.join("a/1", train={"seed": 7, "rates": [1, 2]}, data={"path": "x"})  # as it is after its way to the service
    said = 'another recipe than this run (data.path is "" instead of x; train.seed is 8 instead of 7): start it with the same recipe'
    other = {"train": {"seed": 8, "rates": (1, 2)}, "data": {"path": ""}}
    with pytest.raises(Refused, match=re.escape(f"worker a/2 is refused, since it has {said}") + "$"):
        run.join("a/2", **other)
    both = "has another recipe and another version than this run (luban is 2 instead of 1; data.path"
    with pytest.raises(
        Refused, match=f"^{re.escape('worker a/2 is refused, since it ' + both)}.*recipe and from the same code"
    ):
        run.join("a/2", version="2", **other)
    events = [event for event in run.members.events.since() if event["kind"] == "refused"]
    assert in_words(events[0], "b") == f"worker a/2 is refused, since it has {said.partition(': ')[0]}"
    assert in_words(events[0], "a") is None  # its worker has said it
    with pytest.raises(Refused, match=r"; train\.f4 is null instead of 4 and 4 more\): start"):
        many = run.again("many.db")
        many.join("a/0", train={f"f{i}": i for i in range(9)})
        many.join("a/1", train={})


def test_too_few_workers_wait_and_too_many_are_kept_ready(tmp_path):
    run = Run(tmp_path / "few.db", usable=lambda workers: min(workers, 2), fewest=2)
    run.members.node("a", [0, 1, 2])
    run.join("a/0")
    run.clock.advance(2 * PATIENCE)
    assert run.assignments("a/0") == {}
    run.join("a/1", "a/2")
    assert run.assignments(*THREE) == {"a/0": 0, "a/1": 1}
    assert not run.members.facts.get("change")  # the third would help nobody
    run.members.lost("a/0", "a", "killed")
    run.clock.advance(2 * PATIENCE)
    run.join("a/1")
    assert run.assignments("a/1", "a/2") == {"a/1": 1, "a/2": 0}


def test_a_machine_whose_workers_never_took_part_leaves_without_ending_a_generation(run):
    started(run)
    run.members.node("b", [0])
    with pytest.raises(Refused):
        run.join("b/0", version="2")
    run.members.node("b", [])
    assert run.members.running and not run.members.facts.get("change", False)


def test_a_node_joins_when_all_its_workers_are_there_and_leaves_between_steps(run):
    started(run, THREE[:2])
    run.members.node("b", [0, 1])
    run.join("b/0")
    assert not run.members.facts.get("change")  # members don't stand still while b/1 starts
    run.join("b/1")
    assert run.members.facts.get("change") and run.members.running
    run.join("a/0", "a/1")
    assert run.assignments("a/0", "a/1", "b/0", "b/1") == {"a/0": 0, "a/1": 1, "b/0": 2, "b/1": 3}
    run.members.node("a", [])
    assert run.members.facts.get("change") and run.members.running
    run.join("b/0", "b/1", "a/0", "a/1")
    assert run.assignments("b/0", "b/1") == {"b/0": 0, "b/1": 1}
    assert run.members.assignment("a/0", "a", 2) == {"released": True}


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_always_complete_and_nobody_is_in_two_places(tmp_path, seed):
    draw = random.Random(seed)
    run = Run(tmp_path / "drawn.db", usable=lambda workers: workers)
    run.members.node("a", list(range(4)))
    incarnations = {f"a/{n}": "0" for n in range(4)}
    for turn in range(60):
        name = draw.choice(sorted(incarnations))
        match draw.choice(["lost", "join", "join", "join", "late", "restart"]):
            case "lost":
                run.members.lost(name, incarnations[name], "killed")
                incarnations[name] = str(turn)
            case "join":
                run.join(name, incarnation=incarnations[name])
            case "late":
                run.clock.advance(PATIENCE + 1)
                run.members.assignment(name, incarnations[name], 0)
            case "restart":
                run.open()
        members = run.members.members()
        assert [row["rank"] for row in members] == list(range(len(members)))
        assert not run.members.running or members

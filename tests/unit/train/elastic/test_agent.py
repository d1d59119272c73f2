"""An agent that begins, and one whose workers have ended: what it leaves in memory, and its exit code."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from luban.core.errors import LubanError
from luban.core.plan import ParallelPlan
from luban.train.elastic.agent import Agent
from luban.train.elastic.config import ElasticConfig
from luban.train.elastic.service import ADDRESS, Service, ServiceSettings
from luban.train.elastic.shared_memory import flash_base
from luban.train.elastic.wire import Server

SETTINGS = ServiceSettings(
    plan=ParallelPlan(),
    batch_size=2,
    min_workers=1,
    join_seconds=1,
    silent_seconds=1,
    hang_seconds=1,
    balance=False,
    host="127.0.0.1",
)


class Answers:
    """Answers each question for the status with the next of `answers`, the last one again and again.

    Args:
        answers: (nodes that take part, how the run has ended).
    """

    def __init__(self, answers):
        self.answers = list(answers)

    def ask(self, operation: str, **_):
        nodes, ended = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        known = {"failing": [], "events": [], "unwell": {}, "lives": {}, "generation": 1, "step": 3, "waiting": []}
        return {**known, "nodes": nodes, "ended": ended}

    def until_answered(self, operation: str, **_):
        return None

    def signal(self, number: int) -> None:
        """Of no process."""


@pytest.fixture
def agent(tmp_path) -> Agent:
    elastic = ElasticConfig(flash_folder=str(tmp_path), node="b", spares=0)
    found = Agent([], tmp_path / "run", 2, SETTINGS, elastic)
    for node in ("a", "b"):
        folder = flash_base(str(tmp_path), found.out) / node
        folder.mkdir()
        (folder / "g1-r0-0.flash").touch()
    for place in found.places:
        place.left = True
    return found


def left(agent: Agent) -> list[str]:
    """Nodes with copies in memory."""
    base = flash_base(agent.elastic.flash_folder, agent.out)
    return sorted(file.parent.name for file in base.glob("*/*.flash"))


@pytest.mark.parametrize("stopping", [signal.SIGTERM, None])
def test_a_machine_that_leaves_frees_its_own_copies(agent, stopping):
    agent.stopping, agent.service = stopping, Answers([(["a"], None)])
    assert agent._watch() == (128 + signal.SIGTERM if stopping else 1)
    assert left(agent) == ["a"]


def test_the_last_machine_that_is_stopped_before_a_checkpoint_keeps_the_newest_state(agent):
    agent.stopping, agent.service = signal.SIGTERM, Answers([([], None)])
    assert agent._watch() == 128 + signal.SIGTERM
    assert left(agent) == ["a", "b"]


def test_an_end_that_is_known_late_frees_everything(agent):
    ended = {"code": 143, "message": "stopped after step 3"}
    agent.stopping, agent.service = signal.SIGTERM, Answers([(["b"], None), (["b"], ended)])
    with pytest.raises(LubanError, match="stopped after step 3") as caught:
        agent._watch()
    assert caught.value.exit_code == 143 and left(agent) == []


def test_agents_begin_one_after_the_other_and_both_take_part(agent, tmp_path):
    """Against a service that knows of an earlier session."""
    agent.folder.mkdir()
    service = Service(tmp_path / "service.db", replace(SETTINGS, silent_seconds=1000))
    service.node("a", [0])
    service.agents.clear()
    service.end(0, "done")
    server = Server(service.operations, agent.folder / ADDRESS).start()
    other = Agent([], agent.out, 1, SETTINGS, ElasticConfig(flash_folder=str(tmp_path), node="a", spares=0))
    for each in (agent, other):
        each._begin()
        each.service.client.close()
    server.stop()
    found = service.status(since=0)
    assert found["nodes"] == ["a", "b"] and found["ended"] is None
    assert agent.seen == 2 and other.seen == 3  # a joins, the end; b joins

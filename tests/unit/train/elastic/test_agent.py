"""An agent that begins, and one whose workers have ended: what it leaves in memory, and its exit code."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from luban.core.errors import ConfigError, LubanError
from luban.core.plan import ParallelPlan
from luban.train.elastic.agent import Agent
from luban.train.elastic.config import ElasticConfig, node_of
from luban.train.elastic.local_workers import GRACE, QUICK
from luban.train.elastic.service import ADDRESS, Service, ServiceSettings
from luban.train.elastic.shared_memory import flash_base, remove_flash
from luban.train.elastic.shortage import Shortage
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
        known = {
            "failing": [],
            "events": [],
            "unwell": {},
            "incarnations": {},
            "generation": 1,
            "step": 3,
            "waiting": [],
        }
        known |= {"expected": 1, "fewest": 1}
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
    for slot in found.workers.slots:
        slot.left = True
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
    for slot in agent.workers.slots:
        slot.left = False
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


def test_a_node_is_named_by_what_can_name_a_folder(monkeypatch):
    for name in ("..", ".", ".a", "a/b", "/dev", "a b", "", "a\n", "é", "a\0"):
        if name:
            with pytest.raises(ConfigError, match=r"elastic\.node may have letters, digits"):
                ElasticConfig(node=name)
        monkeypatch.setattr("luban.train.elastic.config.socket.gethostname", lambda name=name: name)
        with pytest.raises(ConfigError, match="host name"):
            node_of(ElasticConfig())
    for name in ("a", "gpu-3.rack_2", "-", "7", "a..b"):
        assert node_of(ElasticConfig(node=name)) == name
        monkeypatch.setattr("luban.train.elastic.config.socket.gethostname", lambda name=name: name)
        assert node_of(ElasticConfig()) == name


@pytest.mark.parametrize("node", ["..", ".", "", "../other", "a/..", "/tmp", "a/b"])
def test_nothing_is_removed_but_folders_right_below_that_of_the_run(tmp_path, node):
    base = tmp_path / "base"
    for folder in (base / "a" / "b", tmp_path / "other"):
        folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="no folder of a node"):
        remove_flash(base, node)
    assert (base / "a" / "b").exists() and (tmp_path / "other").exists()
    remove_flash(base, "a")
    assert list(base.iterdir()) == [] and (tmp_path / "other").exists()


@pytest.mark.parametrize("stopping", [None, signal.SIGTERM])
def test_an_agent_that_cannot_know_of_others_asks_again_unless_it_is_stopped(agent, monkeypatch, capsys, stopping):
    answers, asked = [9.0, 8.5, 0.0], []

    def answer(operation: str, **_):
        asked.append(operation)
        return answers.pop(0) if operation == "begin" else {"event_count": 0}

    agent.folder.mkdir()
    agent.service.until_answered = answer
    monkeypatch.setattr("luban.train.elastic.agent.time.sleep", lambda seconds: None)
    agent.stopping = stopping
    agent._begin()
    assert asked == ["status", "begin"] if stopping else ["status", "begin", "begin", "begin", "status", "node"]
    assert capsys.readouterr().err.count("looking for other machines of this run, for 9 s") == (stopping is None)


def test_too_few_workers_are_said_once_and_end_the_run_after_a_while():
    short = Shortage(patience=100.0, unsaid=20.0)
    status = {"generation": 0, "ended": None, "waiting": ["a/0"], "expected": 2, "fewest": 4}
    message, over = short.look(status, 0.0)
    assert "elastic.min_workers is 4, and 1 of the 2 workers" in message and "for 100 s" in message and not over
    assert short.look(status, 50.0) == ("", False)
    message, over = short.look(status, 101.0)
    assert "1 of the 2 workers of this run is ready after" in message
    assert over and "--elastic.min_workers 1" in message
    # workers that are expected may take a while to start
    starting = {**status, "expected": 4}
    short = Shortage(patience=100.0, unsaid=20.0)
    assert short.look(starting, 0.0) == short.look(starting, 19.0) == ("", False)
    assert short.look({**starting, "waiting": list("abcd")}, 19.5) == ("", False)
    assert short.look(starting, 30.0) == ("", False)  # counted anew
    assert short.look(starting, 51.0)[0]
    assert short.look({**starting, "generation": 1}, 500.0) == ("", False)


def test_a_run_with_too_few_workers_is_ended_with_the_reason(agent, monkeypatch, capsys):
    asked = []
    agent.service.until_answered = lambda operation, **fields: asked.append((operation, fields))
    status = {"generation": 0, "ended": None, "waiting": [], "expected": 2, "fewest": 3}
    for now in (1.0, 2.0, 2.0 + agent.elastic.wait_seconds):
        monkeypatch.setattr("luban.train.elastic.local_workers.time.monotonic", lambda now=now: now)
        agent._wait_for_others(status)
    assert capsys.readouterr().err.count("waiting for more") == 1
    assert [name for name, _ in asked] == ["end"] and "elastic.min_workers is 3" in asked[0][1]["message"]


class Busy:
    """A process that takes its time to end."""

    pid, child = 1, None

    def __init__(self):
        self.signals = []

    def alive(self) -> bool:
        return True

    def signal(self, number: int) -> None:
        self.signals.append(number)


def test_the_wait_for_a_worker_that_stops_is_said_and_so_is_its_end(agent, monkeypatch, capsys):
    slot = agent.workers.slots[0]
    slot.process, slot.incarnation = Busy(), "1"
    status = {"unwell": {}, "incarnations": {slot.name: "1"}}
    said = []
    for seconds in (0.0, QUICK - 1, QUICK + 1, GRACE - 1, GRACE + 1):
        monkeypatch.setattr("luban.train.elastic.local_workers.time.monotonic", lambda now=100 + seconds: now)
        agent.workers.update(slot, status, ended=False, stopping=True)
        said.append(capsys.readouterr().err)
    assert said[0] == said[1] == said[3] == ""
    assert f"waiting for {slot.name} to save and end; killed after 60 s" in said[2]
    assert f"worker {slot.name} did not end within 60 s and is killed" in said[4]
    assert slot.process.signals == [signal.SIGKILL]

"""The service of a run: who takes part, which rows are whose, what happened. It may be killed and started again at any moment."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table, write_json
from luban.core.config import from_dict
from luban.core.plan import ParallelPlan
from luban.train.elastic.accounts import Accounts
from luban.train.elastic.database import Events, Facts, open_database, transaction
from luban.train.elastic.health import Beat, StepTimes, all_wait, failing_node, unwell
from luban.train.elastic.membership import Membership
from luban.train.elastic.processes import started_at
from luban.train.elastic.refit import usable_workers
from luban.train.elastic.rows import Rows
from luban.train.elastic.wire import Server

ADDRESS, DATABASE, SETTINGS, LOCK = "address.json", "service.db", "service.json", "service.lock"
SERVICE = "service.pid.json"  # its process
MOST_FAILURES, FAILURE_SECONDS = 5, 120.0  # of a node's workers, which make it a failing one where no other has any
MOST_EVENTS = 200  # in an answer, which is one line of limited length; the next request gets those after them
ALONE_SECONDS = 300.0  # without any request, after which the service ends


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What the service needs to know of the recipe."""

    plan: ParallelPlan
    batch_size: int  # rows of a step
    min_workers: int
    join_seconds: float
    silent_seconds: float
    hang_seconds: float
    balance: bool
    host: str  # to listen at


class Service:
    """Operations of the service, by name in `operations`.

    Args:
        path: of the database.
        clock: monotonic seconds; `wall`: seconds since the epoch.
    """

    def __init__(
        self,
        path: Path,
        settings: ServiceSettings,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.settings, self.clock = settings, clock
        self.database = database = open_database(path)
        self.facts, self.events = Facts(database), Events(database, wall)
        self.accounts = Accounts(database, wall)
        self.membership = Membership(
            database,
            self.events,
            lambda workers: usable_workers(settings.plan, settings.batch_size, workers),
            settings.min_workers,
            settings.join_seconds,
            clock,
        )
        self.rows = Rows(database, self.membership, self.events, settings.balance)
        self.times = StepTimes()
        self.beats: dict[str, Beat] = {}
        self.incarnations: dict[str, str] = {}  # of the workers that beat
        self.slow: dict[str, float] = {}
        self.began = self.heard = clock()  # this process; any request
        self.agents: dict[str, float] = {}  # node → when its agent was heard
        self.failures: dict[str, dict[str, float]] = {}  # node → incarnation of a worker → when it was lost
        members = self.membership
        self.operations: dict[str, Callable[..., Any]] = {
            "begin": self.begin,
            "node": self.node,
            "join": members.join,
            "assignment": self.assignment,
            "lost": self.lost,
            "beat": self.beat,
            "publish": self.publish,
            "published": self.published,
            "resume": self.rows.resume,
            "lease": self.rows.lease,
            "done": self.done,
            "trained": self.rows.trained,
            "spent_before": self.accounts.add_plain,
            "event": self.event,
            "run_begins": self.run_begins,
            "end": self.end,
            "status": self.status,
            "figures": self.figures,
        }

    def begin(self, node: str) -> float:
        """The agent of a node starts and has found no worker of its own: without others a new session of the run begins.

        The agent of another node that takes part counts as well as a worker: its workers send no heartbeat while they import.

        Returns:
            0: done. Else the seconds after which it is known whether others are at work: this service has just started, and the
            database has nodes that may not have reached it yet. Nothing was changed then.
        """
        now, silent = self.clock(), self.settings.silent_seconds
        others = self._nodes() - {node}
        heard = [
            *(beat.at for beat in self.beats.values()),
            *(self.agents[name] for name in others & self.agents.keys()),
        ]
        if any(now - at < silent for at in heard):
            return 0.0
        unknown = self.began + silent - now
        if unknown > 0 and others and self.facts.get("ended") is None:
            return unknown
        self.membership.forget()
        self.accounts.begin_session()
        self.facts.set(ended=None)
        return 0.0

    def node(self, name: str, numbers: list[int]) -> None:
        """The agent of a node tells which workers it has; none: the node leaves."""
        self.agents[name] = self.clock()
        self.membership.node(name, numbers)

    def beat(
        self, name: str, incarnation: str, generation: int, doing: str, for_seconds: float, collectives: int
    ) -> Any:
        """A worker is alive. Returns whether its generation is at work, and the end of the run, where it has ended."""
        self.heard = self.clock()
        self.beats[name] = Beat(self.heard, doing, for_seconds, collectives)
        self.incarnations[name] = incarnation
        current = self.membership.running and self.membership.generation == generation
        return {"current": current, "ended": self.facts.get("ended")}

    def assignment(self, name: str, incarnation: str, after: int) -> dict[str, Any] | None:
        """The rank of a worker in the next generation; None: not yet."""
        found = self.membership.assignment(name, incarnation, after)
        return found and {**found, "replaces": self.accounts.known(name, incarnation)}

    def lost(self, name: str, incarnation: str, how: str) -> None:
        """A worker's process has ended without being asked to."""
        if self.incarnations.get(name, incarnation) == incarnation:
            self.beats.pop(name, None)
        self.failures.setdefault(name.rpartition("/")[0], {}).setdefault(incarnation, self.clock())
        self.membership.lost(name, incarnation, how)

    def publish(self, generation: int, key: str, value: Any) -> None:
        """Tell the members of a generation something."""
        self.membership.require(generation)
        self.facts.set(**{f"{generation}/{key}": value})

    def published(self, generation: int, key: str) -> Any:
        """What a member has told; None: nothing yet."""
        self.membership.require(generation)
        return self.facts.get(f"{generation}/{key}")

    def done(
        self,
        name: str,
        incarnation: str,
        generation: int,
        step: int,
        rank: int,
        seconds: float,
        ledger: dict[str, float],
    ) -> None:
        """A worker has finished a step."""
        news = self.rows.done(generation, step, rank, seconds)
        self.accounts.report(incarnation, name, ledger)
        if not news:
            return
        self.times.add(name, seconds)
        self.times.keep(row["name"] for row in self.membership.members())
        slow = self.times.stragglers()
        for worker in slow.keys() - self.slow.keys():
            self.events.add("straggler", worker, times_slower=round(slow[worker], 2), step=step)
        self.slow = slow

    def event(self, request: str, kind: str, who: str, **detail: Any) -> None:
        """Something that an agent or worker has noticed. A request that arrives twice has the same identifier `request`."""
        self.events.add_once(kind, who, request=request, **detail)

    def run_begins(self, generation: int) -> None:
        """The run directory is new: what is known is of a run that was there before. Said by the first worker of a generation, and
        done once in it."""
        self.membership.require(generation)
        with transaction(self.database):
            if self.events.add_once("run begins", generation=generation):
                self.accounts.forget()

    def end(self, code: int, message: str) -> None:
        """The run ends for all workers; the first end counts."""
        if self.facts.get("ended") is None:
            self.facts.set(ended={"code": code, "message": message})
            self.events.add("ends", "", code=code, message=message)

    def status(self, since: int, node: str = "") -> dict[str, Any]:
        """For the agent of a node that takes part (no name: for anyone else): events after the first `since`, workers that must be
        replaced, nodes whose workers fail again and again, how the run has ended, who waits for a generation to begin and how many that needs."""
        now = self.heard = self.clock()
        if node:
            self.agents[node] = now
        self._drop_lost_nodes(now)
        settings = self.settings
        expected = self.membership.expected()
        beats = {name: beat for name, beat in self.beats.items() if name in expected}
        if all_wait(beats, now, settings.hang_seconds) and self.membership.running:
            self.membership.end_generation("", "all workers wait for messages that were lost")
        nodes = sorted(self._nodes())
        failures = {name: list(self.failures.get(name, {}).values()) for name in nodes}
        return {
            "failing": failing_node(failures, now, most=MOST_FAILURES, within=FAILURE_SECONDS),
            "nodes": nodes,
            "event_count": self.events.count(),
            "events": self.events.since(since, MOST_EVENTS),
            "unwell": unwell(beats, now, silent=settings.silent_seconds, hang=settings.hang_seconds),
            "incarnations": self.incarnations,
            "ended": self.facts.get("ended"),
            "generation": self.membership.generation if self.membership.running else 0,
            "step": self.rows.last(),
            "waiting": [row["name"] for row in self.membership.waiting()],
            "expected": len(expected),
            "fewest": settings.min_workers,
        }

    def _nodes(self) -> set[str]:
        """Those that take part."""
        return {name.rpartition("/")[0] for name in self.membership.expected()}

    def _drop_lost_nodes(self, now: float) -> None:
        """A node whose agent and workers are all silent is gone: a machine has failed, not a process."""
        silent = self.settings.silent_seconds
        by_node: dict[str, list[str]] = {}
        for name in self.membership.expected():
            by_node.setdefault(name.rpartition("/")[0], []).append(name)
        for node, names in by_node.items():
            heard = [self.agents.get(node, self.began), *(self.beats[name].at for name in names if name in self.beats)]
            if now - max(heard) <= 2 * silent:
                continue
            self.events.add("node fails", node, why="neither its agent nor its workers send heartbeats")
            known = {row["name"]: row["incarnation"] for row in self.membership.workers()}  # also after a restart
            for name in names:
                self.membership.lost(name, known.get(name, ""), "its machine is gone")
                self.beats.pop(name, None)
            self.membership.node(node, [])

    def figures(self) -> dict[str, Any]:
        """For the run's manifest: failures, exactly-once audit, seconds by kind."""
        events = self.events.since()
        begun = max((n for n, event in enumerate(events) if event["kind"] == "run begins"), default=-1)
        events = events[begun + 1 :]
        kinds = [event["kind"] for event in events]
        return {
            "generations": kinds.count("generation begins")
            + (begun >= 0),  # the first began before the run's directory
            "lost_workers": kinds.count("lost"),
            "stragglers": sorted({event["who"] for event in events if event["kind"] == "straggler"}),
            "rows": self.rows.audit(),
            "goodput": self.accounts.told(),
        }


def read_settings(folder: Path) -> ServiceSettings:
    """What the agent of a run has written down for its processes."""
    return from_dict(ServiceSettings, read_table(folder / SETTINGS))


def serve(folder: Path) -> int:
    """Answer until all agents are gone. Returns at once where a service works in `folder` already."""
    with open(folder / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        settings = read_settings(folder)
        service = Service(folder / DATABASE, settings)
        write_json(folder / SERVICE, {"pid": os.getpid(), "started": started_at(os.getpid())})
        server = Server(service.operations, folder / ADDRESS, settings.host, _last_port(folder)).start()
        while time.monotonic() - service.heard < ALONE_SECONDS:
            time.sleep(1.0)
        server.stop()
    return 0


def _last_port(folder: Path) -> int:
    """Where the service listened before; 0: nowhere."""
    path = folder / ADDRESS
    return int(read_table(path)["port"]) if path.exists() else 0


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1])))

"""A worker's connection to the service of its run: heartbeats, and ranks in generations."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from luban.core.errors import TrainingError
from luban.train.elastic.claim import Worker
from luban.train.elastic.processes import started_at
from luban.train.elastic.service import ADDRESS
from luban.train.elastic.wire import Client, OperationFailed, Refused, StaleGeneration
from luban.train.goodput import Goodput
from luban.train.interrupt import StopRequest

BEAT = 0.25  # seconds between two heartbeats
POLL = 0.05  # seconds between two questions for a rank
NOTICED = 3.0  # seconds within which the loss of a worker is known after its connections have broken


@dataclass(frozen=True)
class RankAssignment:
    """A worker's rank in a generation, and who else takes part."""

    generation: int
    rank: int
    workers: tuple[str, ...]  # names by rank
    replaces: bool = False  # whether the worker replaces a lost one

    @property
    def size(self) -> int:
        """Workers of the generation."""
        return len(self.workers)


class Link:
    """A worker's side of the service.

    Args:
        goodput: says what the worker is doing.
        patience: seconds in which a killed service must be back.
    """

    def __init__(self, worker: Worker, goodput: Goodput, patience: float = 120.0):
        self.worker, self.goodput = worker, goodput
        self.client = Client(worker.folder / ADDRESS, patience)
        self.beats = Client(worker.folder / ADDRESS, patience)
        self.lock = threading.Lock()
        self.generation = 0  # at work in
        self.last = 0  # generation that it was part of
        self.ended: dict | None = None  # how the run has ended
        self.over = threading.Event()  # the generation is over
        self.stop = threading.Event()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats."""
        thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join(timeout=4 * BEAT)
            self.beats.close()

    def _beat(self) -> None:
        while not self.stop.wait(BEAT):
            generation = self.generation
            try:
                answer = self.beats(
                    "beat",
                    name=self.worker.name,
                    incarnation=self.worker.incarnation,
                    generation=generation,
                    doing=self.goodput.doing,
                    for_seconds=self.goodput.clock() - self.goodput.since,
                    collectives=_collectives(),
                )
            except (TrainingError, Refused, OperationFailed):  # the requests of the main thread say so
                continue
            self.ended = answer["ended"] or self.ended
            if generation and not answer["current"]:
                with self.lock:
                    if self.generation == generation:
                        self.over.set()
                        break_connections({self.client.fileno(), self.beats.fileno()})

    def await_rank(self, version: Mapping[str, Any], stop: StopRequest) -> RankAssignment | None:
        """Wait for a rank in the next generation; None: the run has ended, or goes on without this worker.

        Raises:
            Refused: the run does not take this worker.
        """
        worker = self.worker
        identity = {"name": worker.name, "incarnation": worker.incarnation, "after": self.last}
        pid = os.getpid()
        self.client("join", **identity, version=version, pid=pid, started=started_at(pid) or "")
        while not stop.signal:
            found = self.client("assignment", **identity)
            if self.ended is not None or (found and found.get("released")):
                return None
            if found is not None:
                self.last = found["generation"]
                return RankAssignment(found["generation"], found["rank"], tuple(found["workers"]), found["replaces"])
            time.sleep(POLL)
        return None

    @contextmanager
    def at_work(self, assignment: RankAssignment) -> Iterator[None]:
        """Part of a generation: its connections are broken when it is over."""
        with self.lock:
            self.over.clear()
            self.generation = assignment.generation
        try:
            yield
        finally:
            with self.lock:
                self.generation = 0

    def is_over(self, assignment: RankAssignment, error: BaseException) -> bool:
        """Whether an error came from the end of the generation. A loss is known a little later than its effects."""
        if isinstance(error, StaleGeneration):
            return True
        deadline = time.monotonic() + NOTICED
        while time.monotonic() < deadline:
            try:
                self.client("published", generation=assignment.generation, key="store")
            except StaleGeneration:
                return True
            if self.ended is not None:
                return True
            time.sleep(POLL)
        return False

    def wait_for_end(self, assignment: RankAssignment) -> None:
        """Wait until the first worker has finished the run. Raises StaleGeneration if it is lost before."""
        while self.ended is None:
            self.client("published", generation=assignment.generation, key="store")
            time.sleep(POLL)

    def disconnect(self) -> None:
        """Leave the other processes of a generation."""
        if dist.is_initialized():
            break_connections({self.client.fileno(), self.beats.fileno()})
            dist.destroy_process_group()

    def store(self, assignment: RankAssignment, host: str, timeout) -> dist.Store:
        """The store in which a generation's processes find each other; the first one has it.

        Raises:
            StaleGeneration: the generation was over before.
        """
        if assignment.rank == 0:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            where = {"host": host, "port": store.port}
            self.client("publish", generation=assignment.generation, key="store", value=where)
            return store
        while True:
            where = self.client("published", generation=assignment.generation, key="store")
            if where is not None:
                return dist.TCPStore(
                    where["host"], where["port"], is_master=False, wait_for_workers=False, timeout=timeout
                )
            time.sleep(POLL)


def _collectives() -> int:
    """How many collectives this process has begun in the group of all."""
    with suppress(Exception):  # no group, or one that is being left
        if dist.is_initialized():
            return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]
    return 0


def break_connections(keep: set[int]) -> None:
    """Shut down all TCP connections of this process but those of the file descriptors `keep`.

    A collective that waits for a lost process would wait until its timeout; Gloo has no other way to end it. NCCL's are aborted.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    for number in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):
            if number in keep or not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(number))
            try:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.getpeername()  # else it listens
                    connection.shutdown(socket.SHUT_RDWR)
            finally:
                connection.close()

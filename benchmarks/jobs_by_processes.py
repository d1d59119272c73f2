"""Jobs whose owners guessed, by processes on this machine: completion times as requested, and resized from what is measured.

    python benchmarks/jobs_by_processes.py
    python benchmarks/jobs_by_processes.py --repeat 3 --out FILE.json

A job is a coordinator and synchronous workers, processes of their own. In each iteration the workers share a batch, whose items they get
from a data store (a process that gives each connection a bounded number of items a second), send a gradient each that the coordinator sums,
and put new rows into a table that grows. A worker's memory is bounded by RLIMIT_AS: one that runs out dies, and the job goes back to its last
checkpoint. As requested, its owner submits it again after --restart seconds with twice the memory. Resized, the policy of
`luban bench jobs` (luban/planner/jobs/policy.py) looks at iteration times and at the memory in /proc every --interval seconds: another number
of workers is started from the coordinator's copy of the state, and limits of memory are raised before they are reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from luban.planner.jobs.policy import Measurements

MEGABYTE = 1 << 20
ITEM = 4096  # bytes
GRADIENT = 1 << 20  # numbers of a worker's gradient
MARGIN = 1.2  # over the predicted memory
OVERHEAD = 4 * MEGABYTE  # of a worker's limit, for what isn't its table
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Request:
    """A job and what its owner asks for."""

    name: str
    iterations: int
    workers: int
    memory: float  # MB of all workers' tables together
    items: int = 48  # of an iteration
    item_seconds: float = 0.005  # of the store for one, on each connection
    growth: float = 1.5  # MB an iteration by which all tables together grow


REQUESTS = (
    Request("too few workers", 60, 1, 200.0),
    Request("too many workers", 120, 16, 400.0),
    Request("too little memory", 80, 4, 48.0),
    Request("right", 50, 4, 200.0),
)


def store(listener: socket.socket, item_seconds: float) -> None:
    """Answers `n` (4 bytes) with n items, one after the other, for each connection by itself."""

    def serve(connection: socket.socket) -> None:
        with connection:
            while len(asked := connection.recv(4, socket.MSG_WAITALL)) == 4:
                for _ in range(int.from_bytes(asked, "little")):
                    time.sleep(item_seconds)
                    connection.sendall(bytes(ITEM))

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def worker(pipe: Connection, port: int, table: float, limit: float) -> None:
    """Does its share of each iteration: (items, MB of new rows) in, a gradient out; None ends it."""
    gradient = np.zeros(GRADIENT, np.float32)
    with socket.create_connection(("127.0.0.1", port)) as data:
        idle = _address_space(os.getpid())
        rows = [np.ones(round(table * MEGABYTE / 8))]
        pipe.send(idle)
        resource.setrlimit(resource.RLIMIT_AS, (idle + OVERHEAD + round(limit * MEGABYTE), resource.RLIM_INFINITY))
        try:
            while (asked := pipe.recv()) is not None:
                items, more = asked
                data.sendall(items.to_bytes(4, "little"))
                for _ in range(items):
                    read = np.frombuffer(data.recv(ITEM, socket.MSG_WAITALL), np.uint8)
                    gradient[: len(read)] += read
                rows.append(np.ones(round(more * MEGABYTE / 8)))
                pipe.send_bytes(gradient)
        except MemoryError:
            os._exit(137)  # as a container that is killed


def _address_space(pid: int) -> int:
    """Bytes, as RLIMIT_AS counts them."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@dataclass
class Job:
    """A job while it runs."""

    request: Request
    port: int
    interval: float  # seconds between two looks; 0: it stays as requested
    restart: float  # seconds until its owner submits it again
    checkpoint: int = 20  # iterations
    workers: int = 0
    memory: float = 0.0  # MB of all tables together
    done: int = 0
    saved: int = 0
    failures: int = 0
    sizes: list[int] = field(default_factory=list)
    measured: Measurements = field(default_factory=Measurements)

    def __post_init__(self) -> None:
        self.workers, self.memory = self.request.workers, self.request.memory
        self.pool: list[tuple[BaseProcess, Connection, int]] = []

    def run(self) -> float:
        """Seconds until all iterations are done."""
        began = looked = time.monotonic()
        self._start()
        while self.done < self.request.iterations:
            try:
                self._iterate()
            except (EOFError, OSError):  # a worker was out of memory
                self._fail()
                continue
            if self.done % self.checkpoint == 0:
                self.saved = self.done
            if self.interval and time.monotonic() - looked > self.interval:
                self._look()
                looked = time.monotonic()
        self._stop()
        return time.monotonic() - began

    def _start(self) -> None:
        """Processes, with the tables as they are after the iterations that are done."""
        self.sizes.append(self.workers)
        table = self.request.growth * self.done / self.workers
        for _ in range(self.workers):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(
                target=worker, args=(theirs, self.port, table, self.memory / self.workers), daemon=True
            )
            process.start()
            theirs.close()
            self.pool.append((process, ours, 0))
        self.pool = [(process, pipe, pipe.recv()) for process, pipe, _ in self.pool]

    def _stop(self) -> None:
        for process, pipe, _ in self.pool:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
            process.join(2.0)
            process.kill()
        self.pool = []

    def _iterate(self) -> None:
        began, n = time.monotonic(), self.workers
        shares = [self.request.items * (i + 1) // n - self.request.items * i // n for i in range(n)]
        for (_, pipe, _), items in zip(self.pool, shares, strict=True):
            pipe.send((items, self.request.growth / n))
        total = np.zeros(GRADIENT, np.float32)
        for _, pipe, _ in self.pool:
            total += np.frombuffer(pipe.recv_bytes(), np.float32)
        self.done += 1
        self.measured.times.setdefault(n, []).append(time.monotonic() - began)

    def _fail(self) -> None:
        self.failures += 1
        self._stop()
        self.done, self.memory = self.saved, 2 * self.memory
        self.measured.memory.clear()
        if not self.interval:
            time.sleep(self.restart)
        self._start()

    def _look(self) -> None:
        """Resize by what was measured."""
        used = sum(_address_space(process.pid or 0) - idle for process, _, idle in self.pool) / MEGABYTE
        self.measured.memory.append((self.done / self.request.iterations, used))
        if (memory := self.measured.wanted_memory(MARGIN)) is not None:
            self.memory = memory
            for process, _, idle in self.pool:
                limit = idle + OVERHEAD + round(memory / self.workers * MEGABYTE)
                limit = max(limit, _address_space(process.pid or 0) + MEGABYTE)
                resource.prlimit(process.pid or 0, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        wanted = self.measured.wanted_workers(self.workers)
        if not 0.8 * self.workers <= wanted <= 1.2 * self.workers:
            self._stop()
            self.workers = wanted
            self._start()


def run(request: Request, interval: float, restart: float) -> dict:
    """One job by itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    data = FORK.Process(target=store, args=(listener, request.item_seconds), daemon=True)
    data.start()
    try:
        job = Job(request, listener.getsockname()[1], interval, restart)
        return {"seconds": job.run(), "workers": job.sizes, "out_of_memory": job.failures}
    finally:
        data.kill()
        listener.close()


def main() -> None:
    """Both ways of each job, by turns; prints a row of medians each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--restart", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="JSON with every run")
    args = parser.parse_args()
    found: list[dict] = []
    for request in REQUESTS:
        for _ in range(args.repeat):
            for way, interval in (("requested", 0.0), ("measured", args.interval)):
                found.append({"job": request.name, "way": way, **run(request, interval, args.restart)})
                print(json.dumps(found[-1]), flush=True)
    medians = {
        way: [statistics.median(r["seconds"] for r in found if (r["job"], r["way"]) == (q.name, way)) for q in REQUESTS]
        for way in ("requested", "measured")
    }
    for i, request in enumerate(REQUESTS):
        print(
            f"{request.name:<20} {medians['requested'][i]:6.1f} s as requested {medians['measured'][i]:6.1f} s as measured"
        )
    before, after = sum(medians["requested"]), sum(medians["measured"])
    load = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    print(f"mean {before / len(REQUESTS):.1f} → {after / len(REQUESTS):.1f} s ({1 - after / before:.0%} lower); {load}")
    if args.out:
        jobs = [asdict(request) for request in REQUESTS]
        args.out.write_text(
            json.dumps({"jobs": jobs, "machine": load, "runs": found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()

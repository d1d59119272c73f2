"""The first process of a model that is divided among several: it schedules and samples, and tells the others what to run."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luban.core.errors import UsageError
from luban.core.plan import ParallelPlan
from luban.generate.cache import float_parameter
from luban.load.model import LoadedModel
from luban.serve.batch import LostProcess
from luban.serve.model_runner import ModelRunner
from luban.serve.pool import Pool, PoolSettings, make_pool
from luban.serve.scheduler import Chunk, Step
from luban.serve.tensor.ranks import Ranks, make_store
from luban.serve.tensor.told import ChunkWriter
from luban.serve.tensor.weights import Shape, divided_module, require_divisible, send_weights

START_SECONDS = 120.0  # that a process may take to be there
REASON_SECONDS = 2.0  # that one may take to say why it failed, once a message to it did


# starts one of the other processes, arguments as of `follower.follow`; returns what ends it at once
Start = Callable[[Connection, Connection, int, int, str, int], Callable[[], None]]


def start_process(
    work: Connection, status: Connection, rank: int, size: int, device: str, port: int
) -> Callable[[], None]:
    """`Start`, as a session of its own: signals of the terminal are for the first process."""
    ends = work.fileno(), status.fileno()
    words = [*map(str, (*ends, rank, size)), device, str(port)]
    command = [sys.executable, "-m", "luban.serve.tensor.follower", *words]
    environment = dict(os.environ)
    if device == "cpu":  # the cores are for all
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
    process = subprocess.Popen(
        command, pass_fds=ends, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
    )

    def end() -> None:
        process.kill()
        process.wait()

    return end


def devices_of(first: torch.device, count: int) -> list[torch.device]:
    """A device for each process, from the first one's on. Raises UsageError for more than there are."""
    if first.type != "cuda":
        return [first] * count
    begin, there = first.index or 0, torch.cuda.device_count()
    if begin + count > there:
        raise UsageError(f"plan.tensor {count} needs as many GPUs from cuda:{begin} on, and there are {there}")
    return [torch.device("cuda", begin + rank) for rank in range(count)]


class Leader:
    """Starts the other processes, divides a model among all, and watches over them.

    Args:
        model: whole; its weights are copied, on any device.
        plan: whose axis `tensor` says how many processes there are.
        device: of the first process; with CUDA the others have the devices behind it.
        start: starts one of them; None: as a process of its own.

    Raises:
        UnsupportedError, ConfigError: the model can't be divided so; the message says what is in the way.
        UsageError: there are fewer GPUs, or this process is in a torch.distributed group already.
        LostProcess: one of the processes ended while it was starting.
    """

    def __init__(
        self,
        model: LoadedModel,
        plan: ParallelPlan,
        device: str | torch.device | None = None,
        start: Start | None = None,
    ):
        require_divisible(model, plan)
        first = float_parameter(model.module).device if device is None else torch.device(device)
        devices, store = devices_of(first, plan.tensor), make_store()
        self.lost: LostProcess | None = None
        self._watchers: list[Callable[[LostProcess], None]] = []
        self._lost, self._closing = threading.Event(), False
        self._ranks: Ranks | None = None  # once all have met
        self._runners: weakref.WeakSet[ModelRunner] = weakref.WeakSet()
        self._ends: list[Callable[[], None]] = []
        self._work: list[Connection] = []
        self._status: list[Connection] = []
        atexit.register(self._end)
        try:
            for rank in range(1, plan.tensor):
                (work, theirs), (status, their_status) = Pipe(), Pipe()
                self._work.append(work)
                self._status.append(status)
                with theirs, their_status:
                    place = str(devices[rank]), store.port
                    self._ends.append((start or start_process)(theirs, their_status, rank, plan.tensor, *place))
            for rank, status in enumerate(self._status, 1):
                self._await(rank, status)
            self.ranks = self._ranks = Ranks(0, plan.tensor, devices[0], store)
            for rank, status in enumerate(self._status, 1):
                threading.Thread(target=self._watch, args=(rank, status), daemon=True).start()
            shape = Shape.of(model.module)
            self.tell("model", shape)
            with self.alike():
                self.module, placements = divided_module(shape, self.ranks)
                send_weights(model.module, self.module, placements, self.ranks)
        except BaseException:
            self.close()
            raise

    def _await(self, rank: int, status: Connection) -> None:
        """Wait until a process is there."""
        problem = "didn't start in time"
        if status.poll(START_SECONDS):
            try:
                said = status.recv()
                problem = f"failed: {said}" if said else ""
            except (EOFError, OSError):
                problem = "ended while it was starting"
        if problem:
            raise LostProcess(f"process {rank} of {len(self._status) + 1} of the model {problem}")

    def _watch(self, rank: int, status: Connection) -> None:
        """Wait until a process fails or ends."""
        try:
            reason = f"failed: {status.recv()}"
        except (EOFError, OSError):
            reason = "ended"
        if not self._closing:
            self._give_up(f"process {rank} of {len(self._status) + 1} of the model {reason}")

    def _give_up(self, reason: str) -> None:
        """End all processes: without one there is no model."""
        if self.lost is not None:
            return
        self.lost = LostProcess(reason)
        self._lost.set()
        for watcher in self._watchers:
            watcher(self.lost)
        self._end_others()
        with contextlib.suppress(Exception):
            if self._ranks is not None:
                self._ranks.abort()

    def watch(self, watcher: Callable[[LostProcess], None]) -> None:
        """Call `watcher`, from another thread, when a process is gone."""
        self._watchers.append(watcher)
        if self.lost is not None:
            watcher(self.lost)

    def check(self) -> None:
        """Raise LostProcess where a process is gone."""
        if self.lost is not None:
            raise LostProcess(str(self.lost))

    def tell(self, what: str, argument: Any) -> None:
        """Let the others do the same as this process does next."""
        self.check()
        message = pickle.dumps((what, argument), pickle.HIGHEST_PROTOCOL)
        try:
            for work in self._work:
                work.send_bytes(message)
        except OSError as error:
            raise self.failed(error) from None

    def failed(self, error: Exception) -> LostProcess:
        """What to raise where this process can't go on as the others do."""
        if not self._lost.wait(REASON_SECONDS):  # else another process's reason
            self._give_up(f"process 0 of {len(self._status) + 1} of the model failed: {type(error).__name__}: {error}")
        return LostProcess(str(self.lost))

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """What the other processes do, too: where it fails here, or there, they are lost to each other."""
        try:
            yield
        except Exception as error:
            raise self.failed(error) from error

    def pool(self, settings: PoolSettings, **own: Any) -> Pool:
        """A pool in every process; `own`: what `make_pool` is given here alone."""
        self.tell("pool", settings)
        with self.alike():
            pool = make_pool(self.module, settings, divided=self.ranks, runner=partial(LeadingRunner, self), **own)
        self._runners.add(pool.runner)
        return pool

    def _end_others(self) -> None:
        for end in self._ends:
            end()

    def close(self) -> None:
        """End the other processes, which are waiting for a forward, and the connections to them."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self._end)
        if self._ranks is not None:
            with contextlib.suppress(LostProcess):
                self.tell("leave", None)  # NCCL's end is one of all
            for runner in self._runners:
                ModelRunner.clear_graphs(runner)  # NCCL's end waits for those of recorded forwards that hold messages
            self._ranks.leave(lost=self.lost is not None)
        self._end()

    def _end(self) -> None:
        """End the other processes, whatever they do."""
        self._closing = True
        self._end_others()
        for connection in (*self._work, *self._status):
            connection.close()


class LeadingRunner(ModelRunner):
    """A runner whose forwards and copies the other processes make, too.

    Args:
        leader: tells them.
        runner: arguments of `ModelRunner`.
    """

    def __init__(self, leader: Leader, *runner: Any):
        super().__init__(*runner)
        self.leader, self.writer = leader, ChunkWriter()

    def copy(self, step: Step) -> None:
        """See `ModelRunner`."""
        if step.swaps_out or step.copies or step.swaps_in:
            self.leader.tell("copy", Step([], step.swaps_out, step.copies, step.swaps_in))
            with self.leader.alike():
                super().copy(step)

    def run(
        self,
        chunks: Sequence[Chunk],
        inspect: Callable[[Chunk, Tensor], None] | None = None,
        tokens_N: Tensor | None = None,
    ) -> Tensor:
        """See `ModelRunner`. Raises LostProcess where any process fails: the others can't know, and would wait for it."""
        self.leader.tell("run" if tokens_N is None else "run_on", self.writer.write(chunks))
        with self.leader.alike():
            if tokens_N is not None:
                dist.broadcast(tokens_N, 0, group=self.leader.ranks.group)
            return super().run(chunks, inspect, tokens_N)

    def clear_graphs(self) -> None:
        """See `ModelRunner`."""
        self.leader.tell("clear", None)
        super().clear_graphs()

"""A process that holds a part of a model and does what the first one tells it, until that one ends.

`python -m luban.serve.tensor.follower`, which `luban.serve.tensor.leader` starts; nobody else does.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from luban.generate.prompt_scores import read_in_parts
from luban.models.base import Model
from luban.serve.pool import Pool, make_pool
from luban.serve.scheduler import Chunk
from luban.serve.tensor.ranks import Ranks
from luban.serve.tensor.told import ChunkReader
from luban.serve.tensor.weights import divided_module, receive_weights


class Follower:
    """What this process holds: its part of the model, and of the pool.

    Args:
        work: from which the first process's messages come, (what, its argument) each.
    """

    def __init__(self, ranks: Ranks, work: Connection):
        self.ranks, self.work = ranks, work
        self.module: Model | None = None
        self.pool: Pool | None = None
        self.reader = ChunkReader()

    def follow(self) -> None:
        """Do as told, until nobody tells anything."""
        while True:
            try:
                message = self.work.recv_bytes()
            except (EOFError, OSError):
                return
            what, argument = pickle.loads(message)
            getattr(self, f"_{what}")(argument)

    def _model(self, shape) -> None:
        """Hold a part of this model."""
        self.module, _ = divided_module(shape, self.ranks)
        receive_weights(self.module, self.ranks)

    def _pool(self, settings) -> None:
        """Make a pool."""
        assert self.module is not None
        self.pool, self.reader = None, ChunkReader()
        self.pool = make_pool(self.module, settings, divided=self.ranks)

    def _copy(self, step) -> None:
        """Copy blocks."""
        assert self.pool is not None
        self.pool.runner.copy(step)

    def _run(self, message: bytes) -> None:
        """Run a forward."""
        assert self.pool is not None
        self.pool.runner.run(self.reader.read(message), self._score)

    @torch.inference_mode()
    def _run_on(self, message: bytes) -> None:
        """Run a forward over tokens that lie on the first process's device."""
        assert self.pool is not None
        chunks = self.reader.read(message)
        tokens_N = torch.empty(len(chunks), dtype=torch.long, device=self.ranks.device)
        dist.broadcast(tokens_N, 0, group=self.ranks.group)
        self.pool.runner.run(chunks, tokens_N=tokens_N)

    def _clear(self, _) -> None:
        """Forget recorded forwards."""
        assert self.pool is not None
        self.pool.runner.clear_graphs()

    def _leave(self, _) -> None:
        """Close the connections to the other processes, once no recorded forward uses them."""
        if self.pool is not None:
            self.pool.runner.clear_graphs()
        self.ranks.leave(lost=False)

    def _score(self, chunk: Chunk, hidden_TE: Tensor) -> None:
        """Take part in the logits that the first process makes of a chunk."""
        assert self.module is not None
        for _ in read_in_parts(self.module, hidden_TE):
            pass


def follow(work: Connection, status: Connection, rank: int, size: int, device: str, port: int) -> None:
    """Be one of the processes of a model, from the first message to the last.

    Args:
        work: where messages come from.
        status: where this process says that it is there ("") and what made it fail.
        port: of the store of the first process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the first process drains, and ends the others
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(status,), daemon=True).start()
    code = 0
    try:
        torch.zeros(1, device=device)  # a device that can't be used is told before the others wait for this process
        status.send("")
        Follower(Ranks(rank, size, torch.device(device), port=port), work).follow()
    except BaseException as error:
        status.send(f"{type(error).__name__}: {error}")
        code = 1
    os._exit(code)  # connections to processes that are gone would be waited for


def _end_with(status: Connection) -> None:
    """End this process when the first one is gone, whatever it waits for."""
    try:
        status.recv_bytes()
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    work, status, rank, size = (int(word) for word in sys.argv[1:5])
    follow(Connection(work), Connection(status), rank, size, sys.argv[5], int(sys.argv[6]))

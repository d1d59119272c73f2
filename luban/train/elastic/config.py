"""Settings of elastic training."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.core.resuming import Numerical, Operational

NODE = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # a machine's name: also that of files and of a folder
FLASH_FOLDER = "/dev/shm"  # of Linux; where there is none, copies lie in the system's folder for temporary files


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """What happens when a worker is lost, and when one joins (docs/ELASTIC.md)."""

    # replace a lost worker while the others keep running, and go on from copies of the state in memory
    enabled: Operational[bool] = False
    min_workers: Operational[int] = 1  # with fewer the run waits for more
    wait_seconds: Operational[float] = 1800.0  # that the run waits for min_workers before it ends
    join_seconds: Operational[float] = 60.0  # that workers wait for all others before they go on without those missing
    flash_every: Operational[int] = 1  # steps between copies of the state in shared memory
    flash_folder: Operational[str] = FLASH_FOLDER  # where these copies lie: a file system in memory
    balance: Numerical[bool] = False  # rows by the measured speed of each worker; false: as many for each
    silent_seconds: Operational[float] = 10.0  # without a heartbeat, after which a worker is killed and replaced
    # without progress outside of collectives, after which a worker's stacks are written down and it is killed and replaced
    hang_seconds: Operational[float] = 300.0
    spares: Operational[int] = 1  # processes that have imported everything and wait to replace a lost worker
    restarts: Operational[int] = 3  # failures of a worker without a step in between, after which it isn't replaced
    host: Operational[str] = "127.0.0.1"  # address at which the machines of the run reach this one
    node: Operational[str] = ""  # name of this machine among those of the run (default: its host name)

    def __post_init__(self):
        for name in ("min_workers", "flash_every", "restarts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"elastic.{name} must be at least 1, {getattr(self, name)} given")
        if self.spares < 0:
            raise ConfigError(f"elastic.spares must be at least 0, {self.spares} given")
        for name in ("wait_seconds", "join_seconds", "silent_seconds", "hang_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"elastic.{name} must be above 0, {getattr(self, name)} given")
        if self.node:
            check_node(self.node, "elastic.node")


def check_node(name: str, what: str) -> None:
    """Raise ConfigError for what can't name a machine, and its files with it."""
    if not re.fullmatch(NODE, name):
        raise ConfigError(
            f"{what} may have letters, digits, '.', '_' and '-', and does not begin with '.': {name!r} given; give another "
            "--elastic.node"
        )


def node_of(elastic: ElasticConfig) -> str:
    """The name of this machine among those of the run. Raises ConfigError where its host name can't be one."""
    if not elastic.node:
        check_node(socket.gethostname(), "this machine's host name, as the name of an elastic run's machine,")
    return elastic.node or socket.gethostname()


def check_elastic(plan: ParallelPlan) -> None:
    """Raise ConfigError for a plan that can't be fitted to another number of workers."""
    fixed = [axis for axis in ("pipeline", "context", "tensor", "expert") if getattr(plan, axis) > 1]
    if fixed:
        raise ConfigError(f"elastic.enabled goes with plan.replicate and plan.shard: leave plan.{fixed[0]} at 1")
    if plan.offload != "none":
        raise ConfigError("elastic.enabled does not go with plan.offload: use --plan.shard")

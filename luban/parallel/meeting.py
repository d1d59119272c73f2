"""How the processes of a run find each other at its start: a process that is late, or that runs something else, is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from luban.core.errors import ConfigError, TrainingError
from luban.core.log import say

POLL = 0.05  # seconds between two looks at who is there
SHOWN = 8  # late processes that a message names, at most


def meet(
    rank: int, size: int, timeout: timedelta, *, patience: float = 30.0, tell: Callable[[str], None] = say
) -> dist.Store:
    """The store that all processes of a run share, once all are there. MASTER_ADDR and MASTER_PORT say where it is: in the first
    process, or with torchrun's agent.

    Args:
        timeout: after which the run ends.
        patience: seconds after which, and after as many again, the first process says who is missing.
        tell: takes these messages.

    Raises:
        TrainingError: some process has not come; the message names it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    begun = time.monotonic()
    try:
        store = dist.TCPStore(
            host, port, is_master=rank == 0 and not agent, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        problem = str(error).splitlines()[0]
        who = "this process can't begin to listen" if rank == 0 else "process 0 is not"
        raise TrainingError(f"{who} at {host}:{port} (MASTER_ADDR, MASTER_PORT): {problem}") from error
    store.set(_key(rank), "")
    keys, said = [_key(each) for each in range(size)], 0
    while not store.check(keys):
        waited = time.monotonic() - begun
        if waited > timeout.total_seconds():
            raise TrainingError(f"{_missing(store, size)} within {waited:.0f} seconds, so that the run can't begin")
        if rank == 0 and waited > patience * (said + 1):
            tell(f"{_missing(store, size)} yet: waiting since {waited:.0f} seconds")
            said += 1
        time.sleep(POLL)
    return store


def _key(rank: int) -> str:
    return f"met/{rank}"


def _missing(store: dist.Store, size: int) -> str:
    late = [str(rank) for rank in range(size) if not store.check([_key(rank)])]
    named = ", ".join(late[:SHOWN]) + f" and {len(late) - SHOWN} more" * (len(late) > SHOWN)
    return f"process{'es' * (len(late) > 1)} {named} of {size} {'have' if len(late) > 1 else 'has'} not come"


def require_same(mine: Mapping[str, Any]) -> None:
    """Raise ConfigError in every process unless all have the same values; every process must call it. The message names the process
    and what differs, of dataclasses their fields."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dict(mine))
    for rank, other in enumerate(found):
        for what, value in other.items():
            first = found[0].get(what)
            if value != first:
                differs = "; ".join(_differences(what, value, first))
                raise ConfigError(f"process {rank} of this run has another {what} than process 0: {differs}")


def _differences(what: str, value: Any, first: Any) -> list[str]:
    if is_dataclass(value) and type(value) is type(first):
        names = [each.name for each in fields(value) if getattr(value, each.name) != getattr(first, each.name)]
        return [f"{what}.{name} {getattr(value, name)} instead of {getattr(first, name)}" for name in names]
    return [f"{value} instead of {first}"]

"""Processes that are late, or that run something else, are named."""

from __future__ import annotations

import re
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from luban.core.errors import ConfigError, TrainingError
from luban.core.plan import ParallelPlan
from luban.parallel.meeting import meet, require_same

WAIT = 30.0


@pytest.fixture
def address(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def together(ranks, size: int, seconds: float, **options) -> dict[int, object]:
    """What `meet` gives or raises in each of these processes, here threads."""
    found: dict[int, object] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = meet(rank, size, timedelta(seconds=seconds), **options)
        except TrainingError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    return found


def test_all_share_one_store(address):
    found = together(range(3), 3, WAIT)
    stores = [found[rank] for rank in range(3)]
    assert all(isinstance(store, dist.Store) for store in stores)
    stores[2].set("said", "here")
    assert stores[1].get("said") == b"here"


def test_a_late_process_is_named_while_it_is_awaited_and_at_the_end(address):
    told: list[str] = []
    found = together((0, 2), 4, 1.0, patience=0.2, tell=told.append)
    assert told and all(
        re.match(r"processes 1, 3 of 4 have not come yet: waiting since \d+ seconds", line) for line in told
    )
    for rank in (0, 2):
        assert isinstance(found[rank], TrainingError)
        assert "processes 1, 3 of 4 have not come within" in str(found[rank])


def test_a_first_process_that_does_not_come_is_named(address):
    found = together((1,), 2, 1.0)
    assert isinstance(found[1], TrainingError) and f"process 0 is not at 127.0.0.1:{address}" in str(found[1])


def test_another_plan_is_named_by_its_fields(monkeypatch):
    plans = [ParallelPlan(shard=2), ParallelPlan(tensor=2)]

    def gathered(found, value):
        found[:] = [{"plan": plan, "code": "a1b2"} for plan in plans]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gathered)
    with pytest.raises(ConfigError) as refused:
        require_same({"plan": plans[1], "code": "a1b2"})
    assert str(refused.value) == (
        "process 1 of this run has another plan than process 0: plan.shard 1 instead of 2; plan.tensor 2 instead of 1"
    )
    plans[1] = plans[0]
    require_same({"plan": plans[1], "code": "a1b2"})

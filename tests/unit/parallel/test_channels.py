"""Messages between stages of a pipeline, without other processes: what is kept of them, and how they are told apart."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from luban.parallel.channels import FIRST, STACKS, Channels


class Work:
    done = False

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.done = True


@pytest.fixture
def channels(monkeypatch):
    """Of two processes with two stages each, and what they send."""
    sent: list[tuple[Tensor, int, int, Work]] = []

    def isend(tensor: Tensor, *, group: object, group_dst: int, tag: int) -> Work:
        sent.append((tensor, group_dst, tag, Work()))
        return sent[-1][-1]

    class Group:
        def size(self) -> int:
            return 2

    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "isend", isend)
    links = [(0, 1), (1, 2), (2, 3), (0, 3)]
    return Channels(links, Group(), torch.device("cpu")), sent, links  # type: ignore[arg-type]


def test_what_has_left_is_not_kept_until_the_end_of_the_step(channels):
    """However many micro-batches a step has: only what is on its way."""
    channels, sent, _ = channels
    draw = random.Random(time.time_ns())
    for number in range(50):
        channels.send(0, 1, number, 0, torch.ones(3))
        assert len(channels.sending) == sum(not work.done for *_, work in sent)
        for *_, work in sent:
            work.done = work.done or draw.random() < 0.5
    channels.wait()
    assert not channels.sending and all(work.done for *_, work in sent)


def test_no_two_messages_between_processes_have_one_tag(channels):
    channels, sent, links = channels
    for pair in [*links, *(link[::-1] for link in links)]:
        for stack in range(STACKS):
            for number in (0, 1, 7, FIRST - 1, FIRST):
                channels.send(*pair, number, stack, torch.ones(1))
    tags = [tag for _, _, tag, _ in sent]
    assert len(set(tags)) == len(tags) == 2 * len(links) * STACKS * 5
    assert max(tags) < 2**31  # what Gloo takes
    assert [to for _, to, *_ in sent[:: STACKS * 5]] == [1, 0, 1, 1, 0, 1, 0, 0]

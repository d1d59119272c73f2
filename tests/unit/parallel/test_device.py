"""Which device a process of a run takes."""

from __future__ import annotations

import pytest
import torch

from luban.core.errors import UnsupportedError
from luban.parallel.device import choose_device


def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto") == torch.device("cuda") and not chosen
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert choose_device("cuda") == torch.device("cuda", rank) and choose_device("cpu") == torch.device("cpu")
    assert chosen == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UnsupportedError, match="start at most 2 processes"):
        choose_device("auto")

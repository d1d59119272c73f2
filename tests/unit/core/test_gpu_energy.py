"""Counters of energy: what is asked of the driver's library, in which units, and what a run adds up."""

from __future__ import annotations

import ctypes

import pytest
import torch

from luban.core import gpu_energy
from luban.core.gpu_energy import energy_counter
from luban.train.account import RunAccount
from luban.train.goodput import Goodput


class Driver:
    """NVML with GPUs by name; their counters in millijoules."""

    def __init__(self, spent: dict[str, int], fails: str = ""):
        self.spent, self.fails = spent, fails
        self.names = list(spent)

    def nvmlInit_v2(self) -> int:
        return int(self.fails == "init")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:
        if uuid.decode() not in self.spent:
            return 6
        handle._obj.value = 1 + self.names.index(uuid.decode())
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, found) -> int:
        if self.fails == "read":
            return 3
        found._obj.value = self.spent[self.names[handle.value - 1]]
        return 0


def test_joules_of_all_gpus_together(monkeypatch):
    driver = Driver({"GPU-a": 5_000, "GPU-b": 70_500})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    read = energy_counter(["a", "GPU-b"])
    assert read is not None and read() == 75.5
    driver.spent["GPU-a"] += 1_000
    assert read() == 76.5
    driver.fails = "read"
    assert read() == 76.5  # the last that is known


def test_none_where_it_cannot_be_read(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert energy_counter(["a"]) is None
    for driver in (Driver({"GPU-a": 9}, fails="init"), Driver({"GPU-a": 9}, fails="read"), Driver({"GPU-b": 9})):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert energy_counter(["a"]) is None
    assert energy_counter([]) is None and gpu_energy.LIBRARY.startswith("libnvidia-ml")


def test_a_run_adds_up_its_sessions():
    joules = iter([1000.0, 1250.0, 9000.0, 9030.0])
    first = RunAccount({}, Goodput(clock=lambda: 0.0), 1.0, lambda: next(joules))
    figures = first.figures()
    assert figures["energy_joules"] == 250.0 and figures["energy_share"] == 1.0
    second = RunAccount(figures, Goodput(clock=lambda: 0.0), 1.0, lambda: next(joules))
    assert second.figures()["energy_joules"] == 280.0


def test_what_was_not_read_before_is_not_made_up():
    unread = RunAccount({"goodput": {"compute": 3.0}}, Goodput(clock=lambda: 0.0), 1.0, lambda: 5.0)
    assert set(unread.figures()) == {"goodput"} and unread.figures()["goodput"]["compute"] == 3.0
    without = RunAccount.of({}, Goodput(), torch.device("cpu"), 4)
    assert set(without.figures()) == {"goodput"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_works_uses_energy():
    read = energy_counter([str(torch.cuda.get_device_properties(0).uuid)])
    if read is None:
        pytest.skip("this GPU has no counter of energy")
    before, x = read(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(4000):
        x @ x
    end.record()
    end.synchronize()
    watts = 1000 * (read() - before) / begin.elapsed_time(end)
    assert 50 < watts < 1500, watts

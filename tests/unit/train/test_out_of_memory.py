"""Running out of memory while training."""

from __future__ import annotations

import pytest
import torch

from luban.core.errors import TrainingError
from luban.parallel.engine import TrainEngine
from luban.parallel.memory_limits import is_out_of_memory
from luban.train.pretrain import pretrain


def test_running_out_of_memory_is_one_line_that_names_settings(tiny, tmp_path, monkeypatch):
    def exhaust(self, batch, factor=1.0, *, stop=False, share=False):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …"
        )

    advice = "goes on .* with less memory if you add --train.accumulate 2 or --plan.remat full; .* needs another --out"
    with monkeypatch.context() as patched:
        patched.setattr(TrainEngine, "submit", exhaust)
        with pytest.raises(TrainingError, match=rf"out of memory in step 1: .* predicted .*{advice}"):
            pretrain(tiny(), tmp_path / "run")
    pretrain(tiny(train={"accumulate": 2}, plan={"remat": "full"}), tmp_path / "run")  # as advised
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

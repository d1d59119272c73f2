"""Every kernel's test runs on poisoned memory: what is allocated holds NaN, so that a result must be written everywhere."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills new memory where it is to be deterministic; warn_only: nothing else changes."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)

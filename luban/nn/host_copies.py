"""Numbers of the host on a device, in copies that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers (nested lists) on the device. `torch.tensor(…, device=…)` would make the host wait for all
    that a GPU has been given before."""
    on_host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)

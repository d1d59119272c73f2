"""How many matrix products something takes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)


class Products(TorchDispatchMode):
    """Counts torch's products of matrices inside of it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in KINDS
        return function(*args, **(kwargs or {}))

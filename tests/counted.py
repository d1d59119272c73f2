"""How many matmuls something takes, and which of Luban's kernels it runs."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = (torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default)


class MatmulCount(TorchDispatchMode):
    """Counts torch's matmuls inside of it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in KINDS
        return function(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts the calls of each of Luban's own operators inside of it, by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.name().partition("::")
        if namespace == "luban":
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


class HostTensors(TorchDispatchMode):
    """Counts the tensors that are made of Python's numbers inside of it: on a GPU the host would wait for each of them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))

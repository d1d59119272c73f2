"""How many matmuls something takes, which of Luban's kernels it runs, and what it sends to other processes."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


FIGURES = 64  # bytes of the all-reduces that carry a step's loss and norm, at most
COLLECTIVES = {  # torch's names
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
}


class Sent(TorchDispatchMode):
    """Bytes and numbers of the collectives over so many processes that are called inside of it."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.bytes, self.count = Counter(), Counter()
        share = (processes - 1) / processes
        # what a collective makes a process send of the largest of its tensors, which an all-gather into one tensor is given too
        self.shares = {
            "send": 1,
            "all_gather_into_tensor": processes - 1,
            "all_reduce": 2 * share,
            "allreduce_": 2 * share,
        }
        self.shares = dict.fromkeys(COLLECTIVES, share) | self.shares

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, rest = str(func).partition(".")
        name = rest.removesuffix(".default")
        if namespace in ("c10d", "_c10d_functional") and name in COLLECTIVES:
            size = max(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
            if size > FIGURES:
                self.bytes[COLLECTIVES[name]] += int(self.shares[name] * size)
                self.count[COLLECTIVES[name]] += 1
        return func(*args, **(kwargs or {}))

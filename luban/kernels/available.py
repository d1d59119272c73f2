"""Checks whether Triton kernels and kernel packages can run, without importing Triton, which not every platform has."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from luban.core.log import warn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: any tensor of a CPU will do
INSTALLED = find_spec("triton") is not None


def triton_runs(*tensors: Tensor) -> bool:
    """True if Triton kernels can run on these tensors."""
    return INSTALLED and (INTERPRETED or all(tensor.is_cuda for tensor in tensors))


def infers_fused(x: Tensor) -> bool:
    """True if gradients are disabled, nothing is being compiled, and Triton kernels, which compute in float32, serve x."""
    plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return plain and type(x) is Tensor and x.dtype != torch.float64 and triton_runs(x)


def unusable(package: str, module: str, load: Callable[[], object], work: str) -> str | None:
    """Why an optional package can't be used; None where it can. One that is installed and fails is warned about.

    Args:
        module: that it installs.
        load: imports what is needed of it, and raises where that isn't what it should be.
        work: what is done without it then.
    """
    if find_spec(module) is None:
        return f"the package {package} is not installed: pip install 'luban[flash]'"
    try:
        load()
    except Exception as error:  # its libraries raise what they like where one of them is missing
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warn(f"the package {package} is installed but can't be used, so that {work} goes without it: {found}")
        return f"the package {package} is installed but can't be used: {found}"
    return None

"""Whether Triton's kernels can run, asked without importing Triton, which not every platform has."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: any tensor of a CPU will do
INSTALLED = find_spec("triton") is not None


def triton_runs(*tensors: Tensor) -> bool:
    """Whether kernels written in Triton can take these tensors."""
    return INSTALLED and (INTERPRETED or all(tensor.is_cuda for tensor in tensors))

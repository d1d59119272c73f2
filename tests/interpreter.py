"""Tests of Triton kernels: directly on a GPU, otherwise under Triton's interpreter in a process of their own, since the
switch is read when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = INTERPRETED or ON_GPU  # whether kernels run in this process
DEVICE = "cuda" if ON_GPU else "cpu"
here = pytest.mark.skipif(not HERE, reason="run under TRITON_INTERPRET=1 by test_under_the_interpreter")


def run_interpreted(file: str, *options: str) -> None:
    """Run a test file under the interpreter, where `here` lets its tests run."""
    command = [sys.executable, "-m", "pytest", "-q", *options, "-p", "no:cacheprovider", file]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # importing installed plugins takes longer than some of these files
    environment = {**os.environ, **alone, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

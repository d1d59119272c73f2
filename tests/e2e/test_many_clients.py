"""Many streaming clients of one server at once: none is dropped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_checkpoint

from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped

pytest.importorskip("fastapi")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
@pytest.mark.parametrize("clients, flags", [(200, ()), (40, ("--plan.tensor", "2"))])
def test_no_client_is_dropped(tmp_path, clients, flags):
    """Slow readers and ones that leave among them; the server ends by itself when it is terminated."""
    spec = uniform(vocab_size=272, width=16, layers=1, context=2048, mixer=Grouped(heads=2))
    model = write_checkpoint(tmp_path / "tiny", spec)
    words = [
        sys.executable,
        SCRIPT,
        model,
        "--clients",
        clients,
        "--minutes",
        0.1,
        "--flags",
        "--cache-gb",
        0.02,
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'answered'" in done.stdout and "dropped" not in done.stdout and "exit code 0" in done.stdout

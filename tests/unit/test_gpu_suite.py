"""The list of GPU figures: its commands fit the scripts that they start, and a run that goes on too long is ended."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def loaded():
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks" / "gpu_suite.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_commands_fit_their_scripts(tmp_path):
    suite = loaded()
    runs = suite.listed()
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        words = run.words(tmp_path, tmp_path, 2)
        script = next((word for word in words if word.startswith("benchmarks/")), None)
        if script is not None:
            source = (ROOT / script).read_text()
            for flag in (word for word in words if word.startswith("--")):
                assert re.search(rf'"{flag}"', source), (run.name, flag)
        elif "pytest" not in words:
            assert words[words.index("-m") + 1] == "luban"
    assert not any(run.together and run.gpus > 1 for run in runs)


def test_a_run_is_ended_at_its_limit_and_a_failure_is_named(tmp_path):
    suite = loaded()
    tell = "import sys, time; print('begun', flush=True); "
    for code, limit, ending in (
        ("time.sleep(600)", 1, "over its limit"),
        ("sys.exit(3)", 60, 3),
        ("print('done')", 60, 0),
    ):
        run = suite.Run("it", limit, f'python -c "{tell}{code}"')
        how = suite.finish(
            run, suite.start(run, run.words(tmp_path, None, 1), tmp_path), time.monotonic(), limit, tmp_path
        )
        assert how["exit"] == ending
        assert how["last"] == {0: "done", 3: "begun"}.get(ending, how["last"])
    json.dumps(how)

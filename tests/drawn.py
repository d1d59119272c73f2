"""Long matrices of cases: a few of them, drawn anew for every run, in `make test`, and all in `make test-all`."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterable
from typing import Any

import pytest

# The same in all of a run's workers, which must agree on what they collect, and in processes that they start.
SEED = os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.environ.setdefault("LUBAN_TEST_DRAW", secrets.token_hex(8))


def drawn(cases: Iterable[Any], keep: int) -> list[Any]:
    """The cases of a parametrized test, all but `keep` of them marked slow. A failing one runs again by its name and -m ""."""
    every = list(cases)
    kept = random.Random(f"{SEED} {len(every)}").sample(range(len(every)), keep)
    return [
        case if at in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for at, case in enumerate(every)
    ]

"""transformers' T5, and LongT5 with local attention, which differ in little."""

from __future__ import annotations

import random
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")


def t5_like(kind: str, rng: random.Random, widest: int) -> tuple[type, type, dict[str, Any]]:
    """Classes of config and model of "t5" or "longt5", and the fields that only that one has.

    Args:
        widest: tokens to each side that LongT5's local attention sees, at most.
    """
    if kind == "longt5":
        fields = {"local_radius": rng.randrange(1, widest + 1)}
        return transformers.LongT5Config, transformers.LongT5ForConditionalGeneration, fields
    return transformers.T5Config, transformers.T5ForConditionalGeneration, {}

"""Random numbers that are a pure function of a seed and a name."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every name, and on nothing else (SHA-256)."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for this seed and purpose."""
    return np.random.default_rng(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed Python's and numpy's global generators (torch is seeded by whoever imports it)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)

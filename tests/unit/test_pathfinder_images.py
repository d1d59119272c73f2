"""Images of the pathfinder benchmark: their class is what an independent search finds, and nothing simpler gives it away."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def pathfinder(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("pathfinder")


def discs(image: np.ndarray, white: int) -> list[np.ndarray]:
    """Centres of the two discs: the pixels nearest to either of the two that are farthest apart."""
    pixels = np.argwhere(image == white)
    apart = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    a, b = np.unravel_index(apart.argmax(), apart.shape)
    return [pixels[(apart[:, i] < apart[:, j])].mean(0) for i, j in ((a, b), (b, a))]


def is_joined(image: np.ndarray, white: int, gap: float) -> bool:
    """Whether every white pixel is reached from the first over pixels no farther apart than neighbouring dashes."""
    reach, ink = math.floor(gap + 1), {tuple(pixel) for pixel in np.argwhere(image > 0)}
    white_ones = [pixel for pixel in ink if image[pixel] == white]
    seen, pending = {white_ones[0]}, [white_ones[0]]
    steps = [(i, j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    while pending:
        y, x = pending.pop()
        near = {(y + i, x + j) for i, j in steps} & ink - seen
        seen |= near
        pending += near
    return set(white_ones) <= seen


@pytest.mark.parametrize(("side", "level"), [(12, (2, 0)), (16, (3, 1)), (32, (3, 1)), (32, (6, 3)), (64, (6, 3))])
def test_the_class_is_whether_a_path_joins_the_discs(pathfinder, side, level):
    level, white = pathfinder.Level(*level), pathfinder.GREYS - 1
    distances = {True: [], False: []}
    for _ in range(12):
        seed = random.randrange(10**9)
        for joined in (True, False):
            image = pathfinder.image(np.random.default_rng(seed), side, joined, level)
            assert is_joined(image, white, pathfinder.sizes(side)[1]) == joined, seed
            distances[joined].append(math.dist(*discs(image, white)))
    apart = np.array(distances[True]) - np.array(distances[False])  # of the same curves
    assert np.abs(apart).max() <= pathfinder.NEAR * max(distances[True]) + 2  # pixels: both discs are rounded


def test_what_has_no_place_is_refused_and_levels_are_read(pathfinder, monkeypatch):
    monkeypatch.setattr(pathfinder, "DRAWN_ANEW", 2)
    with pytest.raises(SystemExit, match="12² pixels have no place for curves of 9 dashes: use others"):
        pathfinder.image(np.random.default_rng(0), 12, True, pathfinder.Level(9, 0))
    assert pathfinder.level_of("4:2") == pathfinder.Level(dashes=4, distractors=2)
    for text in ("4", "0:1", "2:-1", "a:b"):
        with pytest.raises(ValueError):
            pathfinder.level_of(text)

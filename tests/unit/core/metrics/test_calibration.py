"""Expected calibration error beside one that goes through predictions one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from luban.core.metrics.calibration import BINS, calibration


def one_by_one(confidence: list[float], right: list[float]) -> float:
    total = 0.0
    for b in range(BINS):
        low, high = 0.5 + b / (2 * BINS), 0.5 + (b + 1) / (2 * BINS)
        inside = [
            (p, r) for p, r in zip(confidence, right, strict=True) if low <= p < high or (b == BINS - 1 and p == 1)
        ]
        if inside:
            total += abs(sum(p for p, _ in inside) - sum(r for _, r in inside))
    return total / len(confidence)


def test_the_error_is_that_of_a_loop_over_bins():
    rng = random.Random()
    confidence = [rng.uniform(0.5, 1) for _ in range(300)] + [1.0]
    right = [rng.choice([0.0, 0.5, 1.0]) for _ in confidence]
    table, error = calibration(confidence, right)
    assert error == pytest.approx(one_by_one(confidence, right))
    assert sum(row["pairs"] for row in table) == 301 and [row["predicted"] for row in table] == sorted(
        row["predicted"] for row in table
    )


def test_labels_drawn_from_the_predictions_are_calibrated_and_sharpened_ones_are_not():
    rng = np.random.default_rng(0)
    odds = np.abs(rng.normal(0, 1, 40_000))
    p = 1 / (1 + np.exp(-odds))
    right = rng.random(len(p)) < p
    assert calibration(p, right)[1] < 0.02 < 0.1 < calibration(1 / (1 + np.exp(-4 * odds)), right)[1]
    for wrong in (([], []), ([0.5], [1.0, 0.0])):
        with pytest.raises(ValueError, match="as many numbers"):
            calibration(*wrong)

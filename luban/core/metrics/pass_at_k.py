"""pass@k (Chen et al. 2021, equation 1)."""

from __future__ import annotations

import math


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples passes, from `passed` of `samples` that did.

    Raises ValueError unless 1 ≤ k ≤ samples and 0 ≤ passed ≤ samples.
    """
    if not (1 <= k <= samples and 0 <= passed <= samples):
        raise ValueError(f"pass@{k} can't be estimated from {passed} of {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)

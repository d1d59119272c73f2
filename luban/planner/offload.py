"""ZeRO-Infinity's efficiency model (Rajbhandari et al. 2021, section 4): how fast a slower memory must be.

efficiency = ait · bandwidth / (ait · bandwidth + peak), with ait FLOPs a byte that moves: tokens of a step for weights and gradients, a
quarter of them for the optimizer's state.
"""

from __future__ import annotations

STATE_BYTES = 2 * 3 * 4  # of a parameter in an update: fp32 weight and two moments, read and written


def efficiency(intensity: float, bandwidth: float, flops: float) -> float:
    """Share of a step in which the device computes, if nothing overlaps.

    Args:
        intensity: FLOPs a byte.
        bandwidth: bytes a second.
        flops: a second, that the device reaches.
    """
    return intensity * bandwidth / (intensity * bandwidth + flops)


def state_intensity(tokens: int) -> float:
    """FLOPs a byte of the optimizer's state: 6 FLOPs a parameter and token, over 24 bytes a parameter."""
    return 6 * tokens / STATE_BYTES


def gradient_intensity(tokens: int) -> float:
    """FLOPs a byte of weights and gradients in half precision: weights forward and backward and gradients once, 6 bytes a
    parameter."""
    return 6 * tokens / 6

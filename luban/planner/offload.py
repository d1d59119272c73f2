"""What offloading takes of a process's host and disk, and ZeRO-Infinity's efficiency model (Rajbhandari et al. 2021, section 4): how
fast a slower memory must be.

efficiency = ait · bandwidth / (ait · bandwidth + peak), with ait FLOPs a byte that moves: tokens of a step for weights and gradients, a
quarter of them for the optimizer's state.
"""

from __future__ import annotations

from dataclasses import dataclass

from luban.core.plan import ParallelPlan
from luban.core.units import bytes_

PIECE = 2**24  # numbers of a piece of state that is read from a disk, updated and written
PIECES = 3  # in memory: one that is read, one that is updated, one that is written
LAYERS_HERE = 3  # that have their weights on a GPU: the one in use, the one before, the next
BUFFERS = 2  # layers that are read from a disk ahead
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


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Bytes of one process outside of its device."""

    state: int = (
        0  # in memory: fp32 weights and Adam's moments, or the pieces of them that are on their way from and to a disk
    )
    gradients: int = 0  # their sums, and where they arrive
    weights: int = 0  # rounded ones before they are copied to the device
    disk: int = 0  # in the file

    @property
    def total(self) -> int:
        """Of the host's memory."""
        return self.state + self.gradients + self.weights

    def __str__(self) -> str:
        file = f"; {bytes_(self.disk)} on the disk" if self.disk else ""
        return (
            f"{bytes_(self.total)} of the host's memory a process: fp32 weights and moments {bytes_(self.state)}, gradients "
            f"{bytes_(self.gradients)}, rounded weights {bytes_(self.weights)}{file}"
        )


def host_memory(
    plan: ParallelPlan, numbers: int, *, inside: int, layer: int, itemsize: int, pieces: int, gpu: bool
) -> HostMemory:
    """What a plan with `offload` takes of a process's host and disk.

    Args:
        numbers: trained ones that this process updates; inside: of its layers; layer: of its largest layer.
        itemsize: bytes of a number in the matmuls.
        pieces: micro-batches of a step.
        gpu: a GPU computes; else the host's memory is the device's, too.
    """
    wide = max(4, itemsize)
    state = 3 * wide * numbers
    if plan.shards_by_layer:
        return HostMemory(state=state, gradients=wide * numbers * (2 if pieces > 1 else 1))
    arriving = wide if plan.shard > 1 else itemsize
    sums = wide * numbers * (2 if plan.offload_delay else 1)
    disk, gradients = 0, sums + arriving * numbers
    if plan.offload == "disk":
        disk, state = state, PIECES * 3 * wide * min(PIECE, numbers)
    if plan.offload_gradients == "disk":
        disk, gradients = disk + sums, arriving * layer  # on their way
    rounded = numbers if gpu else inside * (plan.offload_weights != "none")
    if plan.offload_weights == "disk":
        disk, rounded = disk + itemsize * inside, rounded - inside + BUFFERS * layer
    return HostMemory(state=state, gradients=gradients, weights=itemsize * rounded, disk=disk)

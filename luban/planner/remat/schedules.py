"""The schedule that a plan names, for a chain with measured or predicted costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from luban.core.errors import ConfigError
from luban.core.units import bytes_, counted, share_or_size
from luban.planner.remat.chain import Chain, Operation, Schedule, save_everything
from luban.planner.remat.rotor import least_memory, rotor
from luban.planner.remat.sqrt_segments import sqrt_segments


def schedule_of(remat: str, chain: Chain, budget: str) -> Schedule:
    """The schedule of `plan.remat` for a chain whose sizes are bytes; for pofo Rotor's, the slowest that it can come to.

    Args:
        budget: `plan.remat_budget`; of rotor and pofo.

    Raises:
        ConfigError: the budget is below the least memory of any schedule, which is named.
    """
    if remat == "sqrt":
        return sqrt_segments(chain)
    size, everything = budget_bytes(chain, budget), save_everything(chain).peak
    if size < everything and size < (least := least_memory(chain)):
        whole = ceil(1000 * least / everything) / 10
        raise ConfigError(
            f"plan.remat_budget {budget} is too small for the activations of a micro-batch: use {_rounded_up(least)}, or "
            f"{whole:g}% of the {bytes_(everything)} that saving everything takes"
        )
    return rotor(
        chain.forward,
        chain.backward,
        chain.output_size,
        chain.saved_size,
        size,
        input_size=chain.input_size,
        forward_temp=chain.forward_temp,
        backward_temp=chain.backward_temp,
    )


def nearest_schedule(remat: str, chain: Chain, budget: str) -> Schedule:
    """The same; with the least budget of any schedule where `budget` is below it, for chains whose costs are only estimated."""
    if remat != "sqrt" and budget_bytes(chain, budget) < min(least_memory(chain), save_everything(chain).peak):
        budget = f"{ceil(least_memory(chain))}B"
    return schedule_of(remat, chain, budget)


def budget_bytes(chain: Chain, budget: str) -> float:
    """`plan.remat_budget` in the unit of the chain's sizes; of a share the peak of saving everything is the whole."""
    share, size = share_or_size("plan.remat_budget", budget)
    return share * save_everything(chain).peak if share is not None else size or 0.0


def summary(chain: Chain, operations: Sequence[Operation], peak: float, transfers: int = 0) -> str:
    """What a schedule keeps and computes again, in a line; the chain's sizes are bytes."""
    again = sum(op.action.startswith("forward") for op in operations) - len(chain)
    text = (
        f"{bytes_(peak)} of the {bytes_(save_everything(chain).peak)} that saving everything takes, "
        f"{counted(again, 'forward pass', 'forward passes')} of {counted(len(chain), 'layer')} repeated"
    )
    return text + f", {counted(transfers, 'tensor')} sent to the host and back" * bool(transfers)


def _rounded_up(size: float) -> str:
    """A size of three digits that isn't smaller."""
    unit = 10.0 ** max(floor(log10(size)) - 2, 0)
    return bytes_(ceil(size / unit) * unit).replace(" ", "")

"""The schedule that a plan names, for a chain with measured or predicted costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from luban.core.errors import ConfigError
from luban.core.plan import BUDGETED
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


@dataclass(frozen=True)
class Solved:
    """What the schedule of a stack's layers keeps and computes again."""

    remat: str
    budget: str  # as given; "" where the schedule isn't solved for one
    peak_bytes: float  # most that is held at once of a micro-batch
    everything_bytes: float  # the same of a schedule that saves everything
    layers: int
    repeated: int  # forward passes of layers beyond one each
    transfers: int  # tensors sent to the host and back

    @staticmethod
    def of(
        remat: str, budget: str, chain: Chain, operations: Sequence[Operation], peak: float, transfers: int = 0
    ) -> Solved:
        """Of a chain whose sizes are bytes."""
        repeated = sum(op.action.startswith("forward") for op in operations) - len(chain)
        everything = save_everything(chain).peak
        return Solved(remat, budget if remat in BUDGETED else "", peak, everything, len(chain), repeated, transfers)

    def __str__(self) -> str:
        text = (
            f"{bytes_(self.peak_bytes)} of the {bytes_(self.everything_bytes)} that saving everything takes, "
            f"{counted(self.repeated, 'forward pass', 'forward passes')} of {counted(self.layers, 'layer')} repeated"
        )
        return text + f", {counted(self.transfers, 'tensor')} sent to the host and back" * bool(self.transfers)


def _rounded_up(size: float) -> str:
    """A size of three digits that isn't smaller."""
    unit = 10.0 ** max(floor(log10(size)) - 2, 0)
    return bytes_(ceil(size / unit) * unit).replace(" ", "")

"""State of a run between steps, and its conversion to and from checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.reader import CheckpointReader
from luban.core.plan import AXES
from luban.core.seeding import derive
from luban.models.spec import ModelSpec, spec_to_dict
from luban.parallel.engine import TrainEngine


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0  # optimizer steps done, skipped ones included; with `left_out` the loader's position
    tokens: int = 0  # real tokens read
    seconds: float = 0.0  # spent training, over all sessions
    bad_steps: int = 0  # skipped for NaN or infinity
    best_step: int | None = None  # checkpoint with the lowest held-out loss
    best_loss: float | None = None  # that loss
    scores: dict[str, float] = field(default_factory=dict)  # last validation's figures
    left_out: int = 0  # batches before the next one that training went past because of spikes
    returns: int = 0  # times that it went back to a checkpoint


@dataclass
class TrainState:
    """Everything that a step changes."""

    spec: ModelSpec
    engine: TrainEngine
    progress: Progress = field(default_factory=Progress)

    def to_checkpoint(self) -> Checkpoint:
        """This process's part of it, as named tensors and plain data. Wall-clock seconds go into the figures, which no hash
        covers, so that equal runs have equal checkpoints."""
        held, progress, world = self.engine.held(), asdict(self.progress), self.engine.world
        seconds = progress.pop("seconds")
        axes = {axis: size for axis, size in zip(AXES, world.plan.sizes, strict=True) if size > 1}
        return Checkpoint(
            spec=spec_to_dict(self.spec),
            model=held["model"],
            optimizer=held["optimizer"],
            random={_of_process(name, world.rank): state for name, state in random_state().items()},
            state={"progress": progress, "loss_scale": asdict(self.engine.scale), **({"axes": axes} if axes else {})},
            figures={
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "seconds": seconds,
                **self.progress.scores,
            },
        )

    def restore(self, checkpoint: CheckpointReader, seed: int) -> None:
        """Go back to a checkpoint of this run, saved under any plan.

        Args:
            seed: of the run; where the plan was another, processes that read other rows than the first draw from it anew.
        """
        self.engine.take_up(checkpoint)
        state, world = checkpoint.state, self.engine.world
        self.progress = Progress(**state["progress"], seconds=checkpoint.manifest.figures["seconds"])
        for name, value in state["loss_scale"].items():
            setattr(self.engine.scale, name, value)
        axes = {axis: size for axis, size in zip(AXES, world.plan.sizes, strict=True) if size > 1}
        rank = world.rank if state.get("axes", {}) == axes else 0
        if world.reader and not rank:
            torch.manual_seed(derive(seed, "process", world.reader, "step", self.progress.step))
            return
        stored = checkpoint.entries("random")
        names = [name for name in ("cpu", "cuda") if _of_process(name, rank) in stored]
        set_random_state({name: checkpoint.whole("random", _of_process(name, rank)) for name in names})


def _of_process(name: str, rank: int) -> str:
    """The name in a checkpoint of a generator's state."""
    return f"{name}@{rank}" if rank else name


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Any) -> None:
    """Put torch's generators back."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())

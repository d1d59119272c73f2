"""State of a run between steps, and its conversion to and from checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from luban.checkpoint.checkpoint import Checkpoint
from luban.models.spec import ModelSpec, spec_to_dict
from luban.parallel.engine import TrainEngine


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0  # optimizer steps done, skipped ones included: also the loader's position
    tokens: int = 0  # real tokens read
    seconds: float = 0.0  # spent training, over all sessions
    bad_steps: int = 0  # skipped for NaN or infinity
    best_step: int | None = None  # checkpoint with the lowest held-out loss
    best_loss: float | None = None  # that loss
    scores: dict[str, float] = field(default_factory=dict)  # last validation's figures


@dataclass
class TrainState:
    """Everything that a step changes."""

    spec: ModelSpec
    engine: TrainEngine
    progress: Progress = field(default_factory=Progress)

    def to_checkpoint(self) -> Checkpoint:
        """All of it as named tensors and plain data; in processes other than the main one without tensors. Wall-clock seconds go into the figures, which no hash covers, so that
        equal runs have equal checkpoints."""
        state, progress = self.engine.state_dict(everywhere=False), asdict(self.progress)
        seconds = progress.pop("seconds")
        return Checkpoint(
            spec=spec_to_dict(self.spec),
            model=state["model"],
            optimizer=state["optimizer"],
            random=random_state(),
            state={"progress": progress, "loss_scale": asdict(self.engine.scale)},
            figures={
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "seconds": seconds,
                **self.progress.scores,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint of this run."""
        self.engine.load_state_dict({"model": checkpoint.model, "optimizer": checkpoint.optimizer})
        set_random_state(checkpoint.random)
        self.progress = Progress(**checkpoint.state["progress"], seconds=checkpoint.figures["seconds"])
        for name, value in checkpoint.state["loss_scale"].items():
            setattr(self.engine.scale, name, value)


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

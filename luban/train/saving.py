"""The checkpoints of a run while it trains: written behind the training, recorded in the run once they are whole."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.manager import CheckpointManager
from luban.checkpoint.saver import CheckpointSaver
from luban.core.artifact import ArtifactWriter, Manifest
from luban.core.errors import LubanError
from luban.core.log import say
from luban.parallel.memory_limits import free_memory
from luban.parallel.world import World
from luban.train.resume import FollowedRun
from luban.train.state import TrainState

MARGIN = 1.25  # of the memory that a copy of the checkpoint takes: what must be free for it


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    step: int
    best: int | None  # the best step so far, whose checkpoint is kept
    seconds: float  # of training up to it
    manifest: Future[Manifest | None]


class RunCheckpoints:
    """Saves a run's checkpoints; every process must make the same calls.

    Args:
        art: the run directory.
        keep: newest checkpoints kept, beside the best.
    """

    def __init__(self, art: ArtifactWriter | FollowedRun, world: World, keep: int):
        self.art, self.keep = art, keep
        self.manager = CheckpointManager(art.path)
        steps = world.agree(self.manager.steps())
        self.last: int | None = steps[-1] if steps else None  # the last whole one
        self.saver = CheckpointSaver(world.host_group())
        self.pending: Pending | None = None

    def begin(self, state: TrainState) -> None:
        """Copy the state of this step and write it while training goes on; wait for it where memory holds no copy.

        Raises:
            LubanError, OSError: the checkpoint before could not be written.
        """
        self.wait()
        checkpoint, at = state.to_checkpoint(), state.progress
        identity = self.art.manifest if isinstance(self.art, ArtifactWriter) else Manifest(kind="run")
        written = self.saver.save(
            self.manager.path(at.step),
            checkpoint,
            config=identity.config,
            parents=identity.parents,
            seed=identity.seed,
            copy=self.saver.holds_copy or _has_room(checkpoint),
        )
        self.pending = Pending(at.step, at.best_step, at.seconds, written)

    def poll(self) -> None:
        """Record the checkpoint that is being written if it is whole by now."""
        if self.pending is not None and self.pending.manifest.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and record it. Raises what went wrong with it."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        manifest = pending.manifest.result()
        self.last = pending.step
        if not isinstance(self.art, ArtifactWriter) or manifest is None:
            return
        best = self.manager.path(pending.best).name if pending.best is not None else None
        self.art.note(
            checkpoints={"last": self.manager.path(pending.step).name, "best": best},
            step=pending.step,
            weights_hash=manifest.figures["weights_hash"],
            seconds=pending.seconds,
        )
        self.manager.keep(self.keep, pending.best)

    def close(self) -> None:
        """After the last: wait for it, and note how long training waited for all."""
        self.wait()
        self.saver.close()
        time = self.saver.time
        self.art.note(checkpoint_seconds=time.total, checkpoint_blocked_seconds=time.blocked)
        if time.total >= 1:
            say(
                f"{time.saves} checkpoints took {time.total:.1f} s, of which training waited {time.blocked:.2f} s "
                f"({time.blocked / time.total:.1%})"
            )

    def abandon(self) -> None:
        """After training has failed: nothing that is written by now is lost, and what failed with it is not news."""
        with contextlib.suppress(LubanError, OSError, RuntimeError):
            self.wait()
        self.saver.close()


def _has_room(checkpoint: Checkpoint) -> bool:
    """Whether this machine's memory holds a copy of what its processes save."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    regions = [region for tensors in checkpoint.regions().values() for region in tensors.values()]
    needed = sum(part.numel() * part.element_size() for region in regions for part, _ in region.pieces)
    return MARGIN * needed * local <= free_memory(torch.device("cpu"))

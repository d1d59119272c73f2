"""The one training loop: pretraining and instruction tuning differ in what they are given, not in how they train."""

from __future__ import annotations

import resource
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from luban.checkpoint.checkpoint import save_checkpoint
from luban.checkpoint.series import Series
from luban.core.artifact import ArtifactWriter
from luban.core.errors import TrainingError
from luban.core.log import Bar, progress, say, warn
from luban.core.units import count
from luban.data.batch import Batch
from luban.data.loader import Loader
from luban.kernels import dispatch, gated
from luban.train.budget import StepCount
from luban.train.compile import LossFunction
from luban.train.interrupt import Interrupted, StopRequest
from luban.train.journal import Journal
from luban.train.profile import Profile
from luban.train.recipe import Recipe
from luban.train.state import TrainState
from luban.train.step import Launched, StepResult, TrainStep
from luban.train.validate import Validation, Validator

IN_FLIGHT = 2  # steps that a CUDA device may be behind the host, so that it never waits for the host
NO_TARGET = ("a batch held no token to predict, so its loss is written as 0: its texts are too short for the objective; "
             "raise train.batch_size or train.seq_len")  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """What the loop drives, already made."""

    recipe: Recipe
    module: nn.Module
    loss: LossFunction  # of held-out batches
    step: TrainStep
    state: TrainState
    loader: Loader
    validator: Validator | None  # None where there is no held-out split


class Loop:
    """Trains inside an open run artifact until its steps are done, then leaves its figures there.

    Raises:
        TrainingError: too many steps were NaN or infinite; names the last good checkpoint.
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """

    def __init__(self, art: ArtifactWriter, pieces: Pieces, clock: Callable[[], float] = time.monotonic):
        self.clock = clock  # seconds since any fixed moment
        self.art, self.pieces, self.recipe, self.state = art, pieces, pieces.recipe, pieces.state
        self.series = Series(art.path)
        train = self.recipe.train
        fixed = art.figures.get("steps_fixed", {})
        self.count = StepCount(train.steps, train.budget_seconds, **fixed)
        self.session = self.clock()
        self.earlier = self.state.progress.seconds  # of earlier sessions
        self.saved: int | None = self.series.steps()[-1] if self.series.steps() else None
        self.side = 0.0  # seconds in validation and saving since the last row
        self.waited = 0.0  # seconds in which there was no batch, after the first step
        self.step_seconds: list[float] = []  # of every step since the start or resume
        self.profile = Profile(art.path, train.profile, self.pieces.step.device) if train.profile else None
        self.flying: deque[tuple[float, Launched]] = deque()  # steps launched and not yet settled, with their factors
        on_cuda = self.pieces.step.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        overlaps = on_cuda and train.precision != "fp16"  # whose next loss scale hangs on the last step
        self.lead = IN_FLIGHT if overlaps else 0

    def run(self) -> None:
        """Train from the state's step to the last."""
        at = self.state.progress
        with (
            StopRequest() as stop,
            Journal(self.art.path, at.step, tensorboard=self.recipe.train.tensorboard) as journal,
            progress("training", total=self.count.total(at.step), unit="steps", start=at.step) as bar,
        ):
            batches = self.pieces.loader.iterate(at.step)
            self.row_time, self.row_tokens = self.clock(), at.tokens
            self.settled, self.settled_at = at.step, self.clock()
            while at.step < self.count.total(at.step):
                self._launch(batches)
                while self.flying and (len(self.flying) > self.lead or self._must_settle(stop)):
                    self._settle(journal, bar)
                self._look_after(journal, stop)
        if self.profile:
            self.profile.finish()
        self._finish()

    def _launch(self, batches: Iterator[Batch]) -> None:
        at = self.state.progress
        factor = self.recipe.schedule.factor(at.step, self.count.total(at.step))
        if self.profile:
            self.profile.begins(at.step + 1)
        began = self.clock()
        batch = next(batches)
        self.waited += (self.clock() - began) if self.step_seconds else 0.0
        if not batch.tokens_trained:
            warn(NO_TARGET)
        self.flying.append((factor, self.pieces.step.launch(batch, factor)))
        at.step += 1

    def _must_settle(self, stop: StopRequest) -> bool:
        """Whether something now needs the figures of every step that was launched."""
        timing = self.recipe.train.budget_seconds and self.count.fixed is None
        tracing = self.profile and self.profile.complete
        return bool(
            stop.signal or timing or tracing or self._due_to_validate() or self._due(self.recipe.checkpoint.every)
        )

    def _due(self, every: int) -> bool:
        """Whether the step just launched is one of every `every`, or the last."""
        step = self.state.progress.step
        return step >= self.count.total(step) or bool(every and step % every == 0)

    def _due_to_validate(self) -> bool:
        return self.pieces.validator is not None and self._due(self.recipe.validation.every)

    def _settle(self, journal: Journal, bar: Bar) -> None:
        """Take up the figures of the oldest step that was launched."""
        factor, launched = self.flying.popleft()
        result = self.pieces.step.settle(launched)
        self.settled += 1
        self._count(result)
        self._log(journal, result, factor, bar)
        now = self.clock()
        if not self.step_seconds:
            self._tell_kernels()
        self.step_seconds.append(now - self.settled_at)
        self._fix_steps(now - self.settled_at, bar)
        self.settled_at = now

    def _tell_kernels(self) -> None:
        """Which kernels the model was traced with."""
        picked = [*dispatch.report(), *gated.report()]
        for line in picked:
            say(line)
        self.art.note(kernels=picked)

    def _count(self, result: StepResult) -> None:
        at, limit = self.state.progress, self.recipe.train.max_bad_steps
        at.tokens += result.tokens
        at.seconds = self.earlier + self.clock() - self.session
        if not result.bad or result.explained:
            return
        at.bad_steps += 1
        if at.bad_steps >= limit:
            last = self.series.path(self.saved) if self.saved is not None else "none was saved yet"
            raise TrainingError(
                f"stopped at step {self.settled}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; "
                f"{at.bad_steps} steps were NaN or infinite (train.max_bad_steps is {limit}). "
                f"Last good checkpoint: {last}. Lower --optim.lr, or look at the data"
            )

    def _log(self, journal: Journal, result: StepResult, factor: float, bar: Bar) -> None:
        at, train = self.state.progress, self.recipe.train
        now = self.clock()
        rate = (at.tokens - self.row_tokens) / max(now - self.row_time - self.side, 1e-9)
        bar.advance(1, f"loss {result.loss:.3f}  {count(float(rate))} tokens/s")
        step = self.settled
        if step % train.log_every and step != 1 and step != self.count.total(step):
            return
        journal.write(step=step, loss=result.loss, tokens=at.tokens, tokens_per_second=rate,
                      lr=self.recipe.optim.lr * factor, grad_norm=result.grad_norm, seconds=at.seconds,
                      bad_steps=at.bad_steps, loss_scale=self.state.scale.value)  # fmt: skip
        self.row_time, self.row_tokens, self.side = now, at.tokens, 0.0

    def _fix_steps(self, seconds: float, bar: Bar) -> None:
        validation = self.recipe.validation
        per_step = 0.0
        if validation.every and self.pieces.validator and validation.batches:
            per_step = validation.batches * seconds / 2 / validation.every  # a forward alone is under half a step
        if self.count.time(self.settled - 1, seconds, self.clock() - self.session + self.earlier, per_step):
            self.art.note(steps_fixed={"fixed": self.count.fixed, "fixed_at": self.count.fixed_at})
            bar.total = self.count.fixed
            say(f"training for {self.count.fixed} steps, which fit the budget of "
                f"{self.recipe.train.budget_seconds:g} seconds")  # fmt: skip

    def _look_after(self, journal: Journal, stop: StopRequest) -> None:
        """Validate and save where they are due, and leave when asked to."""
        if self.flying:
            return
        at, began = self.state.progress, self.clock()
        if self.profile and self.profile.complete:
            self.profile.write()
        last = at.step >= self.count.total(at.step)
        if self._due_to_validate():
            self._validate(journal)
        if stop.signal or self._due(self.recipe.checkpoint.every):
            self.save()
        self.side += self.clock() - began
        self.settled_at += self.clock() - began
        if stop.signal and not last:
            name = signal.Signals(stop.signal).name
            raise Interrupted(stop.signal, f"stopped by {name} after step {at.step}, saved in "
                              f"{self.series.path(at.step)}; the same command resumes")  # fmt: skip

    def _validate(self, journal: Journal) -> Validation:
        at, validator = self.state.progress, self.pieces.validator
        assert validator is not None  # else none is due
        found = validator(self.pieces.module, self.pieces.loss)
        journal.write(step=at.step, **found.row(), seconds=self.earlier + self.clock() - self.session)
        at.scores = found.row()
        saving = at.step % self.recipe.checkpoint.every == 0 or at.step >= self.count.total(at.step)
        if saving and (at.best_loss is None or found.loss < at.best_loss):
            at.best_loss, at.best_step = found.loss, at.step
        return found

    def save(self) -> None:
        """Write the checkpoint of this step and delete those that are no longer kept."""
        at = self.state.progress
        at.seconds = self.earlier + self.clock() - self.session
        identity = self.art.manifest
        manifest = save_checkpoint(self.series.path(at.step), self.state.to_checkpoint(), config=identity.config,
                                   parents=identity.parents, seed=identity.seed,
                                   figures={"step": at.step, "tokens": at.tokens, **at.scores})  # fmt: skip
        self.saved = at.step
        self.series.keep(self.recipe.checkpoint.keep, at.best_step)
        best = self.series.path(at.best_step).name if at.best_step is not None else None
        self.art.note(checkpoints={"last": self.series.path(at.step).name, "best": best}, step=at.step,
                      weights_hash=manifest.figures["weights_hash"], seconds=at.seconds)  # fmt: skip

    def _finish(self) -> None:
        at = self.state.progress
        self.art.note(
            parameters=sum(p.numel() for p in self.state.masters.parameters.values()), tokens=at.tokens,
            seconds=at.seconds, tokens_per_second=at.tokens / max(at.seconds, 1e-9), bad_steps=at.bad_steps,
            **self._speed(),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **at.scores,
        )  # fmt: skip
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.art.note(peak_cuda_bytes=torch.cuda.max_memory_allocated())

    def _speed(self) -> dict[str, float]:
        """The step at its usual, in seconds, the share of all steps' time in which there was no batch, and the share of the
        accelerator's peak that the model's FLOPs are."""
        usual = self.step_seconds[1:]  # the first one compiles
        if not usual:
            return {}
        step, figures = statistics.median(usual), self.art.figures
        found = {"step_seconds": step, "data_wait": self.waited / max(sum(usual), 1e-9)}
        if "peak_flops" in figures:
            found["utilisation"] = figures["model_flops_per_step"] / step / figures["peak_flops"]
        return found

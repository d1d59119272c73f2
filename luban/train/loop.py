"""The one training loop: pretraining and instruction tuning differ in what they are given, not in how they train."""

from __future__ import annotations

import math
import resource
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from luban.checkpoint.checkpoint import save_checkpoint
from luban.checkpoint.manager import FOLDER, CheckpointManager
from luban.core.artifact import ArtifactWriter, read_manifest
from luban.core.errors import TrainingError
from luban.core.log import Bar, progress, say, warn
from luban.core.units import count
from luban.data.batch import Batch
from luban.data.loader import Loader
from luban.kernels import dispatch, gated
from luban.parallel.engine import InFlightStep, StepResult, TrainEngine
from luban.train.budget import StepCount
from luban.train.interrupt import Interrupted, StopRequest
from luban.train.metrics_logger import MetricsLogger
from luban.train.profile import Profile
from luban.train.recipe import Recipe
from luban.train.state import TrainState
from luban.train.validate import Validator

TURNED = 3  # validations above the lowest loss after which a run is warned
IN_FLIGHT = 2  # steps that a CUDA device may be behind the host, so that it never waits for the host
NO_TARGET = (
    "a batch held no token to predict, so its loss is written as 0: its texts are too short for the objective; "
    "raise train.batch_size or train.seq_len"
)


@dataclass(frozen=True)
class TrainerComponents:
    """What the loop drives, already made."""

    recipe: Recipe
    engine: TrainEngine
    state: TrainState
    loader: Loader
    validator: Validator | None  # None where there is no held-out split


class Loop:
    """Trains inside an open run artifact until its steps are done, then leaves its figures there.

    Raises:
        TrainingError: too many steps were NaN or infinite; names the last good checkpoint.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP, after saving.
    """

    def __init__(self, art: ArtifactWriter, parts: TrainerComponents, clock: Callable[[], float] = time.monotonic):
        self.clock = clock  # seconds since any fixed moment
        self.art, self.parts, self.recipe, self.state = art, parts, parts.recipe, parts.state
        self.engine = parts.engine
        self.checkpoints = CheckpointManager(art.path)
        train = self.recipe.train
        fixed = art.figures.get("steps_fixed", {})
        self.count = StepCount(train.steps, train.budget_seconds, **fixed)
        self.session = self.clock()
        self.earlier = self.state.progress.seconds  # of earlier sessions
        self.saved: int | None = self.checkpoints.steps()[-1] if self.checkpoints.steps() else None
        self.overhead_seconds = 0.0  # seconds in validation and saving since the last row
        self.waited = 0.0  # seconds in which there was no batch, after the first step
        self.step_seconds: list[float] = []  # of every step since the start or resume
        self.profile = Profile(art.path, train.profile, self.engine.device) if train.profile else None
        # submitted and not yet synchronized, with their learning-rate factors
        self.in_flight: deque[tuple[float, InFlightStep]] = deque()
        on_cuda = self.engine.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        overlaps = on_cuda and train.precision != "fp16"  # whose next loss scale hangs on the last step
        self.max_in_flight = IN_FLIGHT if overlaps else 0

    def run(self) -> None:
        """Train from the state's step to the last."""
        at = self.state.progress
        with (
            StopRequest() as stop,
            MetricsLogger(self.art.path, at.step, tensorboard=self.recipe.train.tensorboard) as metrics,
            progress("training", total=self.count.total(at.step), unit="steps", start=at.step) as bar,
        ):
            batches = self.parts.loader.iterate(at.step)
            self.row_time, self.row_tokens = self.clock(), at.tokens
            self.synchronized, self.synchronized_at = at.step, self.clock()
            while at.step < self.count.total(at.step):
                self._submit(batches)
                while self.in_flight and (len(self.in_flight) > self.max_in_flight or self._must_synchronize(stop)):
                    self._synchronize(metrics, bar, stop)
                self._validate_and_save(metrics, stop, bar)
        if self.profile:
            self.profile.finish()
        self._finish()

    def _submit(self, batches: Iterator[Batch]) -> None:
        at = self.state.progress
        factor = self.recipe.schedule.factor(at.step, self.count.total(at.step))
        if self.profile:
            self.profile.begins(at.step + 1)
        began = self.clock()
        batch = next(batches)
        self.waited += (self.clock() - began) if self.step_seconds else 0.0
        if not batch.target_count:
            warn(NO_TARGET)
        self.in_flight.append((factor, self.engine.submit(batch, factor)))
        at.step += 1

    def _must_synchronize(self, stop: StopRequest) -> bool:
        """True if all in-flight steps must be synchronized now (validation, checkpoint, stop signal, timing, profiling)."""
        timing = self.recipe.train.budget_seconds and self.count.fixed is None
        tracing = self.profile and self.profile.complete
        return bool(
            stop.signal or timing or tracing or self._due_to_validate() or self._due(self.recipe.checkpoint.every)
        )

    def _due(self, every: int) -> bool:
        """Whether the step just submitted is one of every `every`, or the last."""
        step = self.state.progress.step
        return step >= self.count.total(step) or bool(every and step % every == 0)

    def _due_to_validate(self) -> bool:
        return self.parts.validator is not None and self._due(self.recipe.validation.every)

    def _synchronize(self, metrics: MetricsLogger, bar: Bar, stop: StopRequest) -> None:
        """Wait for the oldest in-flight step, and log it. Raises TrainingError after too many bad steps."""
        factor, step = self.in_flight.popleft()
        result = self.engine.synchronize(step)
        self.synchronized += 1
        self._count(result)
        now = self.clock()
        if not self.step_seconds:
            self._report_kernels()
        self.step_seconds.append(now - self.synchronized_at)
        self._fix_steps(now - self.synchronized_at, bar)
        self.synchronized_at = now
        failed = result.bad and self.state.progress.bad_steps >= self.recipe.train.max_bad_steps
        self._log(metrics, result, factor, bar, ends=failed or bool(stop.signal and not self.in_flight))
        if failed:
            raise self._failure(result)

    def _report_kernels(self) -> None:
        """Which kernels the model was traced with."""
        picked = [*dispatch.report(), *gated.report()]
        for line in picked:
            say(line)
        self.art.note(kernels=picked)

    def _count(self, result: StepResult) -> None:
        at = self.state.progress
        at.tokens += result.tokens
        at.seconds = self.earlier + self.clock() - self.session
        at.bad_steps += bool(result.bad and not result.explained)

    def _failure(self, result: StepResult) -> TrainingError:
        last = self.checkpoints.path(self.saved) if self.saved is not None else "none was saved yet"
        return TrainingError(
            f"stopped at step {self.synchronized}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; "
            f"{self.state.progress.bad_steps} steps were NaN or infinite (train.max_bad_steps is "
            f"{self.recipe.train.max_bad_steps}). Last good checkpoint: {last}. Lower --optim.lr, or look at the data"
        )

    def _log(self, metrics: MetricsLogger, result: StepResult, factor: float, bar: Bar, *, ends: bool) -> None:
        """Advance the bar, and write a row of metrics where one is due or the step `ends` the session."""
        at, train = self.state.progress, self.recipe.train
        now = self.clock()
        rate = (at.tokens - self.row_tokens) / max(now - self.row_time - self.overhead_seconds, 1e-9)
        bar.advance(1, f"loss {result.loss:.3f}  {count(float(rate))} tokens/s")
        step = self.synchronized
        if not ends and step % train.log_every and step != 1 and step != self.count.total(step):
            return
        metrics.write(
            step=step,
            loss=result.loss,
            tokens=at.tokens,
            tokens_per_second=rate,
            lr=self.recipe.optim.lr * factor,
            grad_norm=result.grad_norm,
            seconds=at.seconds,
            bad_steps=at.bad_steps,
            loss_scale=self.engine.scale.value,
            **result.metrics,
        )
        self.row_time, self.row_tokens, self.overhead_seconds = now, at.tokens, 0.0

    def _fix_steps(self, seconds: float, bar: Bar) -> None:
        validation = self.recipe.validation
        per_step = 0.0
        if validation.every and self.parts.validator and validation.batches:
            per_step = validation.batches * seconds / 2 / validation.every  # a forward alone is under half a step
        if self.count.time(self.synchronized - 1, seconds, self.clock() - self.session + self.earlier, per_step):
            self.art.note(steps_fixed={"fixed": self.count.fixed, "fixed_at": self.count.fixed_at})
            bar.total = self.count.fixed
            if short := self.recipe.schedule.never_at_peak(self.count.fixed or 0):
                warn(short)
            say(
                f"training for {self.count.fixed} steps, which fit the budget of "
                f"{self.recipe.train.budget_seconds:g} seconds"
            )

    def _validate_and_save(self, metrics: MetricsLogger, stop: StopRequest, bar: Bar) -> None:
        """Validate and save where they are due, and leave when asked to."""
        if self.in_flight:
            return
        at, began = self.state.progress, self.clock()
        if self.profile and self.profile.complete:
            self.profile.write()
        validated = self._due_to_validate()
        improved = validated and self._validate(metrics)
        shortened = validated and not improved and self._end_early(bar)
        last = at.step >= self.count.total(at.step)
        if improved or shortened or stop.signal or self._due(self.recipe.checkpoint.every):
            self.save()
        self.overhead_seconds += self.clock() - began
        self.synchronized_at += self.clock() - began
        if stop.signal and not last:
            name = signal.Signals(stop.signal).name
            raise Interrupted(
                stop.signal,
                f"stopped by {name} after step {at.step}, saved in "
                f"{self.checkpoints.path(at.step)}; the same command resumes",
            )

    def _validate(self, metrics: MetricsLogger) -> bool:
        """Measure the held-out loss. Returns whether it is the lowest so far."""
        at, validator = self.state.progress, self.parts.validator
        assert validator is not None  # else none is due
        found = validator(self.engine)
        metrics.write(step=at.step, **found.row(), seconds=self.earlier + self.clock() - self.session)
        at.scores = found.row()
        improved = found.loss < (math.inf if at.best_loss is None else at.best_loss)  # false for NaN
        if improved:
            at.best_loss, at.best_step = found.loss, at.step
        return improved

    def _end_early(self, bar: Bar) -> bool:
        """Lower the number of steps where the held-out loss has turned. Returns whether it did."""
        at, validation = self.state.progress, self.recipe.validation
        if at.best_step is None or not validation.every:
            return False
        above, total = (at.step - at.best_step) // validation.every, self.count.total(at.step)
        turned = f"held-out loss has been above its lowest ({at.best_loss:.3f} after step {at.best_step}) for {above} validations"
        if not validation.patience:
            if above == TURNED and at.step < total:
                warn(
                    f"{turned}: more steps teach this model its training text by heart. --validation.patience ends such a run"
                )
            return False
        steps = self.recipe.schedule.ends_early(at.step, total)
        if above < validation.patience or steps >= total:
            return False
        self.count.fixed, self.count.fixed_at = steps, at.step
        self.art.note(steps_fixed={"fixed": steps, "fixed_at": at.step})
        bar.total = steps
        end = (
            "training ends here"
            if steps == at.step
            else f"the learning rate falls from here on, and training ends after step {steps}"
        )
        say(f"{turned}: {end}")
        return True

    def save(self) -> None:
        """Write the checkpoint of this step and delete those that are no longer kept."""
        at = self.state.progress
        at.seconds = self.earlier + self.clock() - self.session
        identity = self.art.manifest
        manifest = save_checkpoint(
            self.checkpoints.path(at.step),
            self.state.to_checkpoint(),
            config=identity.config,
            parents=identity.parents,
            seed=identity.seed,
        )
        self.saved = at.step
        self.checkpoints.keep(self.recipe.checkpoint.keep, at.best_step)
        best = self.checkpoints.path(at.best_step).name if at.best_step is not None else None
        self.art.note(
            checkpoints={"last": self.checkpoints.path(at.step).name, "best": best},
            step=at.step,
            weights_hash=manifest.figures["weights_hash"],
            seconds=at.seconds,
        )

    def _finish(self) -> None:
        at = self.state.progress
        named = {self.checkpoints.path(step).name for step in (at.best_step, self.saved) if step is not None}
        spare = (self.checkpoints.path(step).name for step in self.checkpoints.steps())
        self.art.volatile += tuple(
            f"{FOLDER}/{name}/*" for name in spare if name not in named
        )  # kept, but not the result
        if at.best_step is not None and at.best_step != self.saved:  # that is the one that the run stands for
            best = read_manifest(self.checkpoints.path(at.best_step))
            self.art.note(weights_hash=best.figures["weights_hash"])
            say(
                f"held-out loss was lowest after step {at.best_step} ({at.best_loss:.3f}): the run is loaded from there; "
                f"the last checkpoint is {self.checkpoints.path(at.step).name}"
            )
        self.art.note(
            parameters=sum(p.numel() for p in self.engine.params.parameters.values()),
            tokens=at.tokens,
            seconds=at.seconds,
            tokens_per_second=at.tokens / max(at.seconds, 1e-9),
            bad_steps=at.bad_steps,
            **self._speed(),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **at.scores,
        )
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.art.note(peak_cuda_bytes=torch.cuda.max_memory_allocated())

    def _speed(self) -> dict[str, float]:
        """Median step time in seconds, fraction of time spent waiting for data, and model FLOPs utilisation (MFU)."""
        usual = self.step_seconds[1:]  # the first one compiles
        if not usual:
            return {}
        step, figures = statistics.median(usual), self.art.figures
        found = {"step_seconds": step, "data_wait": self.waited / max(sum(usual), 1e-9)}
        if "peak_flops" in figures:
            found["utilisation"] = figures["model_flops_per_step"] / step / figures["peak_flops"]
        return found

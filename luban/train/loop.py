"""The training loop, shared by pretraining and fine-tuning, which differ only in their components."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from luban.checkpoint.manager import FOLDER
from luban.checkpoint.reader import CheckpointReader
from luban.core.artifact import ArtifactWriter, read_manifest
from luban.core.errors import TrainingError
from luban.core.log import Bar, progress, say, warn
from luban.core.units import count
from luban.data.batch import Batch
from luban.data.loader import Loader
from luban.kernels import dispatch, gated
from luban.parallel.engine import InFlightStep, StepResult, TrainEngine
from luban.parallel.memory_limits import peak_memory
from luban.parallel.remat.scheduled import schedule_figures
from luban.train.account import RunAccount
from luban.train.budget import StepCount
from luban.train.conflict import GradientConflict
from luban.train.goodput import Goodput
from luban.train.interrupt import Interrupted, StopRequest
from luban.train.messages import messages_of
from luban.train.metrics_logger import MetricsLogger, NoMetrics, open_metrics
from luban.train.profile import Profile
from luban.train.recipe import Recipe
from luban.train.resume import FollowedRun
from luban.train.saving import RunCheckpoints
from luban.train.spikes import Spike, SpikeDetector
from luban.train.state import TrainState
from luban.train.step_figures import step_figures
from luban.train.timed import time_communication
from luban.train.validate import Measure, Validator

WARN_AFTER = 3  # validations without improvement before a warning
# steps submitted to a CUDA device before the oldest is synchronized, so that it never waits for the host
MAX_IN_FLIGHT = 2
NO_TARGET = (
    "a batch had no token to predict, so its loss is logged as 0: its documents are too short for the objective; "
    "raise train.batch_size or train.seq_len"
)


@dataclass(frozen=True)
class TrainerComponents:
    """Components of a run."""

    recipe: Recipe
    engine: TrainEngine
    state: TrainState
    loader: Loader
    validator: Validator | None  # None without a held-out split
    conflict: GradientConflict | None = None  # of several tasks


class Loop:
    """Trains to the last step inside an open run directory and writes its metrics to the manifest.

    Args:
        art: the open run directory.
        parts: components of the run.
        clock: monotonic seconds.
        goodput: of this process; None: from now on.

    Raises:
        TrainingError: too many steps were NaN or infinite; the message names the last good checkpoint.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP, after saving.
    """

    def __init__(
        self,
        art: ArtifactWriter | FollowedRun,
        parts: TrainerComponents,
        clock: Callable[[], float] = time.monotonic,
        goodput: Goodput | None = None,
    ):
        self.clock = clock
        self.goodput = goodput or Goodput(clock=clock)
        if parts.engine.world.size > 1:
            time_communication(parts.engine, self.goodput)
        self.art, self.parts, self.recipe, self.state = art, parts, parts.recipe, parts.state
        self.engine, self.world = parts.engine, parts.engine.world
        self.measure = Measure() if parts.validator is None else parts.validator.measure
        self.account = RunAccount.of(art.figures, self.goodput, self.engine.device, self.world.size)
        self.agreed_stop = False  # some process of the run was asked to stop, and all know it
        self.saving = RunCheckpoints(art, self.world, self.recipe.checkpoint.keep)
        self.checkpoints = self.saving.manager
        train = self.recipe.train
        fixed = art.figures.get("steps_fixed", {})
        self.count = StepCount(train.steps, train.budget_seconds, **fixed)
        self.session_start = self.clock()
        self.earlier_seconds = self.state.progress.seconds  # of the sessions before a resume
        self.row_time, self.row_tokens = self.session_start, self.state.progress.tokens  # at the last row of metrics
        self.synchronized, self.synchronized_at = self.state.progress.step, self.session_start  # last step, its time
        self.overhead_seconds = 0.0  # seconds in validation and saving since the last row
        self.waited = 0.0  # seconds spent waiting for data, after the first step
        self.step_seconds: list[float] = []  # of every step since the start or resume
        self.profile = (
            Profile(art.path, train.profile, self.engine.device) if train.profile and self.world.is_main else None
        )
        self.in_flight: deque[tuple[float, InFlightStep]] = deque()  # submitted steps, with their learning-rate factors
        self.spikes = SpikeDetector(self.recipe.spikes)
        self.batches: Iterator[Batch] = iter(())
        on_cuda = self.engine.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        # fp16 needs the previous step's result to set the loss scale
        self.max_in_flight = MAX_IN_FLIGHT if on_cuda and train.precision != "fp16" else 0

    def run(self) -> None:
        """Train from the current step to the last."""
        try:
            self._train()
            with self.goodput.spent("checkpoint"):
                self.saving.close()
        except BaseException:
            self.saving.abandon()
            raise
        if self.profile:
            self.profile.finish()
        self.goodput.enter("idle")
        if self.recipe.train.profile and self.world.size > 1:
            self.art.note(messages=messages_of(self.art.figures, self.world, self.engine.device))
        self._finish()

    def _train(self) -> None:
        at = self.state.progress
        with (
            StopRequest() as stop,
            open_metrics(self.art.path, at.step, self.recipe.train.tensorboard, self.world.is_main) as metrics,
            progress("training", total=self.count.known(at.step), unit="steps", start=at.step) as bar,
        ):
            self.batches = self.parts.loader.iterate(at.step + at.left_out)
            self.row_time, self.synchronized_at = self.clock(), self.clock()
            while self.state.progress.step < self.count.total(self.state.progress.step):
                self.goodput.enter("compute")
                self._submit(stop)
                while self.in_flight and (len(self.in_flight) > self.max_in_flight or self._must_synchronize(stop)):
                    self._synchronize(metrics, bar, stop)
                self._validate_and_save(metrics, stop, bar)

    def _submit(self, stop: StopRequest) -> None:
        at = self.state.progress
        factor = self.recipe.schedule.factor(at.step, self.count.total(at.step))
        factor *= self.recipe.spikes.cooling**at.returns
        if self.profile:
            self.profile.begins(at.step + 1)
        began = self.clock()
        with self.goodput.spent("data"):
            batch = next(self.batches)
        self.waited += (self.clock() - began) if self.step_seconds else 0.0
        share = self.world.plan.readers > 1
        self.in_flight.append((factor, self.engine.submit(batch, factor, stop=bool(stop.signal), share=share)))
        at.step += 1

    def _must_synchronize(self, stop: StopRequest) -> bool:
        """True if all in-flight steps must be synchronized now (validation, checkpoint, stop signal, timing, profiling)."""
        timing = self.recipe.train.budget_seconds and self.count.fixed is None
        tracing = self.profile and self.profile.complete
        return bool(
            stop.signal or timing or tracing or self._due_to_validate() or self._due(self.recipe.checkpoint.every)
        )

    def _must_stop(self, stop: StopRequest) -> bool:
        """True if the run ends after this step: with several processes, once all of them know of the request."""
        return bool(stop.signal) if self.world.size == 1 else self.agreed_stop

    def _due(self, every: int) -> bool:
        """True if the step just submitted is a multiple of `every` (0: never), or the last."""
        step = self.state.progress.step
        return step >= self.count.total(step) or bool(every and step % every == 0)

    def _due_to_validate(self) -> bool:
        return self.parts.validator is not None and self._due(self.recipe.validation.every)

    def _synchronize(self, metrics: MetricsLogger | NoMetrics, bar: Bar, stop: StopRequest) -> None:
        """Wait for the oldest in-flight step and log it. Raises TrainingError after too many bad steps."""
        factor, step = self.in_flight.popleft()
        result = self.engine.synchronize(step)
        if not result.targets:
            warn(NO_TARGET)
        self.agreed_stop = result.stop
        self.synchronized = self.goodput.step = self.synchronized + 1
        self._count(result)
        now = self.clock()
        if not self.step_seconds:
            self._report_first_step()
        self.step_seconds.append(now - self.synchronized_at)
        self._fix_steps(now - self.synchronized_at, bar)
        self.synchronized_at = now
        failed = result.bad and self.state.progress.bad_steps >= self.recipe.train.max_bad_steps
        self._log(metrics, result, factor, bar, ends=failed or (self._must_stop(stop) and not self.in_flight))
        if failed:
            raise self._failure(result)
        if self.recipe.spikes.action != "off" and (spike := self.spikes.observe(result.loss, result.grad_norm)):
            self._pass(spike, metrics, bar)

    def _pass(self, spike: Spike, metrics: MetricsLogger | NoMetrics, bar: Bar) -> None:
        """Report a spike at the step that was synchronized last; go back to the last checkpoint if that is wanted, and go on with
        the batches behind the spike's."""
        config, at, step = self.recipe.spikes, self.state.progress, self.synchronized
        metrics.write(step=step, spike=spike.value, spike_sigmas=spike.sigmas)
        self.art.note(
            spikes=[*self.art.figures.get("spikes", []), {"step": step, "what": spike.what, "value": spike.value}]
        )
        back = config.action == "skip" and at.returns < config.most
        self.saving.wait()
        if not back or self.saving.last is None:
            why = ": no checkpoint to go back to" if back else ": went back often enough"
            warn(f"spike at step {step}: {spike}{why * (config.action != 'report')}")
            return
        while self.in_flight:  # steps behind the spike, which are undone with it
            self.engine.synchronize(self.in_flight.popleft()[1])
        last, past, returns = self.saving.last, step + at.left_out + config.beyond, at.returns + 1
        self.state.restore(CheckpointReader.open(self.checkpoints.path(last)), self.recipe.train.seed)
        at = self.state.progress
        at.left_out, at.returns, at.seconds = past - at.step, returns, self._elapsed()
        bar.advance(at.step - step)
        self.synchronized, self.row_tokens = at.step, at.tokens
        self.batches = self.parts.loader.iterate(past)
        self.spikes.reset()
        metrics.write(step=step, back_to=at.step, left_out=at.left_out)
        warn(f"spike at step {step}: {spike}: going on from the checkpoint of step {last} with batch {past + 1}")

    def _report_first_step(self) -> None:
        """Log and record the kernels picked while tracing, and record what schedules of rematerialisation keep."""
        picked = [*dispatch.report(), *gated.report()]
        for line in picked:
            say(line)
        self.art.note(kernels=picked, **schedule_figures(self.engine.module))

    def _elapsed(self) -> float:
        """Training seconds of the run so far, earlier sessions included."""
        return self.earlier_seconds + self.clock() - self.session_start

    def _count(self, result: StepResult) -> None:
        at = self.state.progress
        at.tokens += result.tokens
        at.seconds = self._elapsed()
        at.bad_steps += bool(result.bad and not result.explained)

    def _failure(self, result: StepResult) -> TrainingError:
        self.saving.wait()
        last = self.checkpoints.path(self.saving.last) if self.saving.last is not None else "none was saved yet"
        return TrainingError(
            f"stopped at step {self.synchronized}: loss {result.loss:g}, gradient norm {result.grad_norm:g}; "
            f"{self.state.progress.bad_steps} steps were NaN or infinite (train.max_bad_steps is "
            f"{self.recipe.train.max_bad_steps}). Last good checkpoint: {last}. Lower --optim.lr, or look at the data"
        )

    def _log(
        self, metrics: MetricsLogger | NoMetrics, result: StepResult, factor: float, bar: Bar, *, ends: bool
    ) -> None:
        """Advance the bar; write a row of metrics if one is due or the step `ends` the session."""
        at, train = self.state.progress, self.recipe.train
        now = self.clock()
        rate = (at.tokens - self.row_tokens) / max(now - self.row_time - self.overhead_seconds, 1e-9)
        told = self.recipe.objective.told({"loss": result.loss, **result.metrics, **at.scores})
        bar.advance(1, f"{told}  {count(float(rate))} tokens/s")
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
        """Record a step's seconds; with a time budget, fix the number of steps once enough are measured."""
        validation = self.recipe.validation
        per_step = 0.0
        if validation.every and self.parts.validator and validation.batches:
            per_step = validation.batches * seconds / 2 / validation.every  # a forward alone is under half a step
        timing = bool(self.count.budget_seconds) and self.count.fixed is None
        self.count.record(self.synchronized - 1, seconds, self._elapsed(), per_step)
        if timing:
            self.count = self.world.agree(self.count)
        if timing and self.count.fixed is not None:
            self.art.note(steps_fixed=self.count.figures())
            bar.total = self.count.fixed
            if short := self.recipe.schedule.never_at_peak(self.count.fixed or 0):
                warn(short)
            say(
                f"training for {self.count.fixed} steps, which fit the budget of "
                f"{self.recipe.train.budget_seconds:g} seconds"
            )

    def _validate_and_save(self, metrics: MetricsLogger | NoMetrics, stop: StopRequest, bar: Bar) -> None:
        """Validate and save if due. Raises Interrupted after a stop signal."""
        self.saving.poll()
        if self.in_flight or self.state.progress.step == self.saving.last:  # the latter after going back to it
            return
        at, began = self.state.progress, self.clock()
        if self.profile and self.profile.complete:
            self.profile.write()
        validated = self._due_to_validate()
        improved = validated and self._validate(metrics)
        shortened = validated and not improved and self._end_early(bar)
        last = at.step >= self.count.total(at.step)
        asked = self._must_stop(stop)
        if improved or shortened or asked or self._due(self.recipe.checkpoint.every):
            at.seconds = self._elapsed()
            with self.goodput.spent("checkpoint"):
                self.saving.begin(self.state)
        self.overhead_seconds += self.clock() - began
        self.synchronized_at += self.clock() - began
        if asked and not last:
            number = stop.signal or signal.SIGTERM  # another process got it
            name = signal.Signals(number).name
            with self.goodput.spent("checkpoint"):
                self.saving.wait()
            self.art.note(**self.account.figures())
            raise Interrupted(
                number,
                f"stopped by {name} after step {at.step}, saved in "
                f"{self.checkpoints.path(at.step)}; the same command resumes",
            )

    def _validate(self, metrics: MetricsLogger | NoMetrics) -> bool:
        """Measure the held-out loss. Returns true if it is the lowest so far."""
        at, validator = self.state.progress, self.parts.validator
        assert validator is not None  # otherwise no validation is due
        found = self.world.agree(validator(self.engine))
        conflict = {} if self.parts.conflict is None else self.parts.conflict(self.engine, at.step)
        metrics.write(step=at.step, **found.row(), **conflict, seconds=self._elapsed())
        at.scores = found.row()
        improved = found.loss < (math.inf if at.best_loss is None else at.best_loss)  # false for NaN
        if improved:
            at.best_loss, at.best_step = found.loss, at.step
        return improved

    def _end_early(self, bar: Bar) -> bool:
        """Lower the number of steps if the held-out loss stopped improving. Returns true if it did."""
        at, validation = self.state.progress, self.recipe.validation
        if at.best_step is None or not validation.every:
            return False
        waited, total = (at.step - at.best_step) // validation.every, self.count.total(at.step)
        words, best = self.measure, self.measure.best_value(at.best_loss)
        status = f"{words.name} has not improved for {waited} validations ({words.best}: {best} at step {at.best_step})"
        if not validation.patience:
            if waited == WARN_AFTER and at.step < total:
                warn(f"{status}: {words.no_better}; use --validation.patience to stop early")
            return False
        steps = self.recipe.schedule.ends_early(at.step, total)
        if waited < validation.patience or steps >= total:
            return False
        self.count.fix(at.step, steps)
        self.art.note(steps_fixed=self.count.figures())
        bar.total = steps
        end = "training ends here"
        if steps > at.step:
            end = f"the learning rate decays from now on, and training ends after step {steps}"
        say(f"{status}: {end}")
        return True

    def _finish(self) -> None:
        if not isinstance(self.art, ArtifactWriter):
            return
        at = self.state.progress
        named = {self.checkpoints.path(step).name for step in (at.best_step, self.saving.last) if step is not None}
        every = (self.checkpoints.path(step).name for step in self.checkpoints.steps())
        # extra checkpoints, excluded from the content hash
        self.art.volatile += tuple(f"{FOLDER}/{name}/*" for name in every if name not in named)
        if at.best_step is not None and at.best_step != self.saving.last:  # loading the run loads the best checkpoint
            found = read_manifest(self.checkpoints.path(at.best_step))
            self.art.note(weights_hash=found.figures["weights_hash"])
            say(
                f"{self.measure.best} {self.measure.name} was at step {at.best_step} ({self.measure.best_value(at.best_loss)}); loading the run loads that checkpoint. Last: "
                f"{self.checkpoints.path(at.step).name}"
            )
        self.art.note(
            parameters=sum(p.numel() for p in self.engine.params.working.values()),
            tokens=at.tokens,
            seconds=at.seconds,
            tokens_per_second=at.tokens / max(at.seconds, 1e-9),
            bad_steps=at.bad_steps,
            **step_figures(self.step_seconds, self.waited, self.art.figures),
            **self.account.figures(),
            peak_rss_bytes=peak_memory(),
            **at.scores,
        )
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.art.note(peak_cuda_bytes=torch.cuda.max_memory_allocated())

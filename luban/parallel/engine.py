"""One optimizer step: micro-batches, a loss divided by the targets of the whole step, clipping, update.

Nothing in a step waits for the device: whether it was good is decided there, and the host learns it when it asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from luban.data.batch import Batch
from luban.nn.embedding import EmbeddingNoise
from luban.nn.host_copies import sent
from luban.nn.init import Region
from luban.nn.position.randomised import RandomisedPositions
from luban.objectives.base import LossModule
from luban.optim.base import Optimizer, Update
from luban.optim.clip import clip_factor, global_norm
from luban.parallel.asynchronous import Asynchronous
from luban.parallel.context import tokens_of
from luban.parallel.gather import together
from luban.parallel.gradients import GradientSums
from luban.parallel.micro_batches import Runner, Totals
from luban.parallel.precision import LossScale, MixedPrecisionParams
from luban.parallel.routers import Routers
from luban.parallel.stored import Stored, held, parameter_of, take_up

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import

RANDOM = (nn.Dropout, EmbeddingNoise, RandomisedPositions)  # modules that draw numbers in training alone


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    loss: float  # mean of the objective in nats a target, over the whole step
    tokens: int  # real tokens read (no padding)
    targets: int  # that the mean is over
    grad_norm: float  # global norm before clipping
    bad: bool  # NaN or infinite: nothing was updated
    explained: bool  # bad, but only because the fp16 loss scale was too large
    stop: bool = False  # whether some process of the run asks for its end
    metrics: dict[str, float] = field(default_factory=dict)  # of the loss module, means


class HeldOut(NamedTuple):
    """What a held-out batch gave."""

    loss: float  # summed, in nats
    targets: int  # that the loss was summed over
    metrics: dict[str, tuple[float, float]]  # name → (sum, count), of the loss module


@dataclass(frozen=True)
class InFlightStep:
    """A step that the device may still be working on."""

    figures: (
        # on the host: summed loss, gradient norm with the loss scale still in it, sums and counts of metrics, whether some
        # process asks for the end, routers' figures, targets that the loss was summed over, real tokens read
        Tensor
    )
    done: torch.cuda.Event | None  # when they have arrived; None on a CPU, where they have
    scale: float  # the loss scale it ran with
    metrics: tuple[str, ...]  # their names


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's arrays as tensors by name, each with its rows first."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.arrays().items()}
    if device.type == "cuda":
        tensors = {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return tensors


class TrainEngine:
    """A model in training on one device; made by `luban.parallel.apply.apply`.

    Args:
        runner: runs the micro-batches of a step.
        module: the loss module, whose `model` is trained.
        sums: adds up the gradients of the processes that train it together.
        routers: the mixtures of experts of the model; None: there are none.
    """

    def __init__(
        self,
        runner: Runner,
        params: MixedPrecisionParams | ShardedParams,
        optimizer: Optimizer,
        scale: LossScale,
        *,
        module: LossModule,
        clip: float,
        accumulate: int,
        device: torch.device,
        sums: GradientSums | None = None,
        routers: Routers | None = None,
    ):
        self.sums = sums or GradientSums()
        self.world, self.placements = self.sums.world, self.sums.placements
        self.runner, self.module, self.routers = runner, module, routers or Routers({}, {}, random=False)
        self.params, self.optimizer, self.scale = params, optimizer, scale
        self.clip, self.accumulate, self.device = clip, accumulate, device
        self.random_parts = [part for part in module.modules() if isinstance(part, RANDOM)]

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.module.model

    def step(self, batch: Batch, factor: float = 1.0) -> StepResult:
        """One optimizer step at `factor` times the peak learning rate, to its end."""
        return self.synchronize(self.submit(batch, factor))

    def submit(self, batch: Batch, factor: float = 1.0, *, stop: bool = False, share: bool = False) -> InFlightStep:
        """Start one optimizer step.

        The loss of every micro-batch is a sum over its targets, divided by the targets of all of them, so that cutting
        a batch into micro-batches, and those among processes, changes nothing but rounding.

        Args:
            batch: of the whole step, the same in every process, or this process's `share` of its rows (`Loader`).
            factor: on the peak learning rate.
            stop: ask all processes for the run's end.
        """
        scale, counts = self.scale.value, self._counts(batch, share=share)
        weight = scale / max(batch.target_count, 1) if not share else scale / counts[0].clamp_min(1)
        micro_batches = list(self._micro_batches(batch, weight, share=share))
        if isinstance(self.runner, Asynchronous):
            found, norm = self.runner.train_and_update(micro_batches, weight, partial(self._change, factor))
            norm, totals = self.sums.norm({"": norm[None]}), self._totals(found, stop=stop)
        else:
            found = self.runner.train(micro_batches, weight)
            summed = self.sums.sum(self.params.gradients())
            norm, totals = self.sums.norm(summed), self._totals(found, stop=stop)
            self._update(factor, summed, norm, totals[0].isfinite().to(norm.device) & norm.isfinite())
            self.params.clear()
        figures = torch.stack([each.double().to(self.device) for each in (totals[0], norm, *totals[1:], *counts)])
        figures, done = _to_host(figures)
        return InFlightStep(figures, done, scale, found.names)

    def _counts(self, batch: Batch, *, share: bool) -> Tensor:
        """(2,) targets and real tokens of the whole step. Of the processes that read the same rows the first counts them."""
        counts = sent([batch.target_count, batch.tokens_read], self.device, torch.float64)
        if not share:
            return counts
        first = all(self.world.index(axis) == 0 for axis in ("tensor", "context", "pipeline"))
        return self.world.sum(counts if first else torch.zeros_like(counts))

    def _totals(self, found: Totals, *, stop: bool) -> list[Tensor]:
        """Sums over all processes: of the loss, of metrics and their counts, of requests to stop, of routers' figures."""
        counted = torch.stack(found.values)
        counted = counted if self.world.counts else torch.zeros_like(counted)
        loads = self.routers.figures(counted)
        return list(self.world.sum(torch.cat([counted, torch.full_like(counted[:1], float(stop)), *loads])))

    def _update(self, factor: float, summed: Mapping[str, Tensor], norm: Tensor, good: Tensor) -> None:
        """One update by summed gradients, clipped to their global norm; nothing changes unless they are `good`."""
        gradients = {self.params.parameters[name]: gradient for name, gradient in summed.items()}
        clipped = clip_factor(norm, self.clip, self.scale.value)
        self.optimizer.step(factor, Update(gradients, clipped, good, self.params.copies()))
        self.params.gather()

    def _change(self, factor: float, gradients: Mapping[str, Tensor]) -> Tensor:
        """One update of this process's stage by the gradients of a micro-batch; returns their norm."""
        summed = self.sums.sum(gradients)
        norm = global_norm(list(summed.values()))
        self._update(factor, summed, norm, norm.isfinite())
        return norm

    def synchronize(self, step: InFlightStep) -> StepResult:
        """Wait for a step's end and read its figures."""
        if step.done is not None:
            step.done.synchronize()
        loss, norm, *parts, targets, tokens = step.figures.tolist()
        stop, *loads = parts[2 * len(step.metrics) :]
        bad = not (np.isfinite(loss) and np.isfinite(norm))
        explained = self.scale.update(bad) and bool(np.isfinite(loss))
        counted = zip(step.metrics, parts[::2], parts[1::2], strict=False)
        metrics = {
            name: total / count for name, total, count in counted if count
        }  # one of several tasks may have no rows
        metrics |= self.routers.metrics(loads)
        return StepResult(
            loss=loss / max(targets, 1),
            tokens=int(tokens),
            targets=int(targets),
            grad_norm=norm / step.scale,
            bad=bad,
            explained=explained,
            metrics=metrics,
            stop=bool(stop),
        )

    def abandon_step(self) -> None:
        """Forget what was begun of a step that can't be finished, because another process is gone."""
        self.params.clear()
        for layer in self.routers.layers.values():
            layer.tally.take()

    def evaluate(self, batch: Batch) -> HeldOut:
        """Summed loss and metrics of a held-out batch."""
        self._finish_update()
        tensors, readers = to_device(batch, self.device), self.world.plan.readers
        divisible = all(tensor.shape[0] % readers == 0 for tensor in tensors.values())
        with self._without_randomness(), self._averaged():
            # where rows can't be divided, every process reads all of them
            found = self.runner.evaluate(self._mine(tensors, divided=divisible))
        counts = self.world.counts and (divisible or self.world.reader == 0)
        totals = torch.stack(found.values)
        loss, *parts = self.world.sum(totals if counts else torch.zeros_like(totals)).tolist()
        metrics = dict(zip(found.names, zip(parts[::2], parts[1::2], strict=True), strict=True))
        return HeldOut(loss, batch.target_count, metrics)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of a batch's mean loss by the parameters' names, on every process, with nothing drawn at random. Neither
        parameters nor optimizer change.

        Args:
            batch: the same in every process, its rows a multiple of the processes and micro-batches.
        """
        self._finish_update()
        weight = 1 / max(batch.target_count, 1)
        with self._without_randomness():
            self.runner.train(list(self._micro_batches(batch, weight, share=False)), weight)
        found = {name: gradient.clone() for name, gradient in self.sums.sum(self.params.gradients()).items()}
        self.params.clear()
        self.routers.figures(torch.zeros((), device=self.device))  # not those of a step
        return found

    def _finish_update(self) -> None:
        """Let an update that is still running end, and its weights arrive."""
        if self.optimizer.finish():
            self.params.gather()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the weights that the optimizer averages, if it does."""
        if not self.optimizer.averages():
            yield
            return
        with self.optimizer.averaged(self.params.copies()):
            self.params.gather()
            yield
        self.params.gather()

    @contextmanager
    def _without_randomness(self) -> Iterator[None]:
        """Modules that draw numbers in training draw none."""
        for part in self.random_parts:
            part.eval()
        try:
            yield
        finally:
            for part in self.random_parts:
                part.train()

    def held(self) -> dict[str, dict[str, Region]]:
        """What this process has of the weights under "model" (the fp32 ones, where there are such) and of the optimizer's state
        under "optimizer", as views of the tensors that the next step changes."""
        self._finish_update()
        return held(self.params, self.optimizer, self.placements)

    def take_up(self, stored: Stored) -> None:
        """Go on from a checkpoint that was saved under any plan, of which this process reads its own part."""
        self._finish_update()
        take_up(stored, self.params, self.optimizer, self.placements)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Weights and optimizer state as `held`, but whole in every process, as a run in one process has them. Every process
        must call it."""
        self._finish_update()
        model = self._whole({**self.params.state_dict(), **self.optimizer.averages()}, lambda name: name)
        return {"model": model, "optimizer": self._whole(self.optimizer.state_dict(), parameter_of)}

    def _whole(self, held: Mapping[str, Tensor], parameter: Callable[[str], str]) -> dict[str, Tensor]:
        """Tensors of which this process holds parts; `parameter` is that which an entry is of."""
        found = {}
        for entry, local in held.items():
            name = parameter(entry)
            tensor = self.placements.whole(name, self.params.whole(name, local))
            found[entry] = None if tensor is None else tensor.cpu()
        return together(found, self.world)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, of a run under any plan."""
        self._finish_update()
        mine = self.placements.cut
        self.params.load_state_dict({name: mine(name, state["model"][name]) for name in self.params.state_dict()})
        optimizer = {}
        for entry, value in state["optimizer"].items():
            name = parameter_of(entry)
            if name in self.params.parameters or name not in state["model"]:  # else another process has it
                optimizer[entry] = self.params.part(name, mine(name, value))
        self.optimizer.load_state_dict(optimizer)
        self.params.refresh()

    def _micro_batches(self, batch: Batch, weight: float | Tensor, *, share: bool) -> Iterator[dict[str, Tensor]]:
        tensors, pieces = to_device(batch, self.device), self.accumulate * self.world.plan.microbatches
        for name, array in self.routers.arrays(batch).items():
            tensors[name] = torch.from_numpy(array).to(self.device, non_blocking=True)
        if "router_weights" in tensors:
            # Processes of the axis tensor compute the same auxiliary losses, whose gradients are summed; PipeDream updates by
            # every micro-batch.
            updates = pieces if isinstance(self.runner, Asynchronous) else 1
            tensors["router_weights"] = tensors["router_weights"] * weight * (updates / self.world.plan.tensor)
        for piece in batch.cut(tensors, pieces):
            yield self._mine(piece, divided=not share)

    def _mine(self, tensors: dict[str, Tensor], *, divided: bool = True) -> dict[str, Tensor]:
        """What this process reads: its rows, unless they aren't to be `divided`, and of them its tokens."""
        rows = self.world.rows(tensors) if divided else tensors
        return tokens_of(rows, self.world.index("context"), self.world.plan.context)


def _to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not figures.is_cuda:
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return host, done

"""From a recipe to a finished run directory: everything is checked first, then made, then driven by the loop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from luban.adapters.base import rates_of
from luban.core.artifact import ArtifactWriter, command_line, require_free
from luban.core.errors import DataError, TrainingError, UsageError
from luban.core.hashing import code_version, data_sha256
from luban.core.log import say, warn
from luban.core.resuming import split_config
from luban.core.seeding import derive, seed_everything
from luban.core.units import bytes_
from luban.data.batch import Batch
from luban.data.loader import Loader
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.kernels import gated
from luban.kernels.dispatch import chosen
from luban.load.adapted import base_reference
from luban.load.model import LoadedModel
from luban.models.build import build_model
from luban.nn.attention.backend import AttentionBackend
from luban.nn.embedding import add_noise, shrink_gradient
from luban.nn.float8 import require_float8
from luban.objectives.base import Objective
from luban.parallel.apply import Execution, apply
from luban.parallel.device import choose_device, keep_freed_memory, multiplies_bf16, set_determinism
from luban.parallel.engine import TrainEngine
from luban.parallel.heartbeat import watched
from luban.parallel.memory_limits import is_out_of_memory
from luban.parallel.plan_checks import check_plan, check_run
from luban.parallel.world import World, described_loss, is_lost_connection, process_count
from luban.train.conflict import GradientConflict
from luban.train.goodput import Goodput
from luban.train.loop import Loop, TrainerComponents
from luban.train.metrics_logger import require_tensorboard
from luban.train.predict import Prediction, predict, require_memory
from luban.train.recipe import Recipe, TrainConfig
from luban.train.resume import FollowedRun, opened_together, resume, run_artifact, write_recipe
from luban.train.start import Start, choose_start
from luban.train.state import TrainState
from luban.train.validate import Validator


def train(
    recipe: Recipe,
    out: Path,
    *,
    task: str,
    name: str,
    clock: Callable[[], float] = time.monotonic,
    model: LoadedModel | None = None,
    components: Callable[..., TrainerComponents] | None = None,
) -> Path:
    """Train as `recipe` says into the run directory `out`: begin it, resume what is unfinished there, or extend a finished
    run to more steps. A finished run with nothing left to train is left as it is.

    Args:
        task: what the run is for: "pretrain" or "sft".
        name: the recipe as it was called, for people.
        model: that of `recipe.init`, where it was loaded already.
        clock: seconds since any fixed moment, which budgets and rates are counted by.
        components: makes the components of the run, in the place of `assemble`.

    Raises:
        LubanError: anything that is wrong, before anything is written; TrainingError and Interrupted after.
    """
    recipe, _, _, device = opened = open_run(recipe, model)
    world = World.join(
        recipe.plan, device, {"code": code_version(), "recipe": data_sha256(split_config(recipe)[0])[:12]}
    )
    goodput, make = Goodput(clock=clock), components or assemble
    with watched(world.store, world.rank, world.size, activity=goodput, hang=recipe.train.hang_seconds):
        return _train(opened, out, world, task=task, name=name, clock=clock, goodput=goodput, make=make)


def _train(
    opened: tuple[Recipe, Shards, Start, torch.device],
    out: Path,
    world: World,
    *,
    task: str,
    name: str,
    clock: Callable[[], float],
    goodput: Goodput,
    make: Callable[..., TrainerComponents],
) -> Path:
    """`train`, once the processes have met."""
    recipe, shards, start, device = opened
    art = run_artifact(recipe, out, task=task, shards=shards, start=start)
    if world.agree(art.finished()):
        say(f"{out} is finished: nothing is left to train. More steps: the same command with a larger --train.steps")
        return Path(out)
    prediction = predict_run(*opened)
    _require_memory(*opened, prediction)
    if recipe.train.tensorboard:
        require_tensorboard()
    with opened_together(art, world) as art:
        begin(art, opened, prediction, world, name)
        parts = make(recipe, shards, start, device, world, art.path)
        resume(art, recipe, parts.state, start)
        say(prediction.summary())
        try:
            Loop(art, parts, clock, goodput).run()
        except (RuntimeError, MemoryError) as error:
            if world.size > 1 and is_lost_connection(error):
                raise TrainingError(f"another process of this run {described_loss(error)}") from error
            if not is_out_of_memory(error):
                raise
            raise _exhausted(recipe, prediction, parts.state.progress.step) from error
    return Path(out)


def is_begun(art: ArtifactWriter | FollowedRun) -> bool:
    """Whether a run directory holds what it holds from the start: a process may have been killed while it wrote it."""
    return "accelerator" in art.figures


def begin(
    art: ArtifactWriter | FollowedRun,
    opened: tuple[Recipe, Shards, Start, torch.device],
    prediction: Prediction,
    world: World,
    name: str,
) -> None:
    """Check that the disk has enough free space, and write what a run directory holds from the start, unless all of it is there."""
    recipe, shards, start, device = opened
    begun = is_begun(art)
    require_free(
        art.path,
        4 * _saved_numbers(prediction, world) * (recipe.checkpoint.keep + 2),
        "training with these checkpoints",
    )
    if isinstance(art, ArtifactWriter) and not begun:
        write_recipe(art, recipe, start)
        shutil.copytree(Path(shards.path) / "tokenizer", art.path / "tokenizer", dirs_exist_ok=True)
        art.note(recipe=name, command=command_line())
        if recipe.adapter is not None:
            art.note(base=base_reference(recipe.init))
    if not begun or art.changed:
        art.note(device=str(device), accelerator=prediction.machine.name, **prediction.figures())
    gated.clear()
    chosen.clear()  # of runs before, where there were any in this process


def _saved_numbers(prediction: Prediction, world: World) -> int:
    """Of a checkpoint: weights and optimizer state. Of several processes each holds parts: two moments a weight are assumed."""
    if world.size > 1:
        return 3 * prediction.parameters
    return prediction.memory.parameters // 4 + prediction.memory.optimizer // 4


def _exhausted(recipe: Recipe, prediction: Prediction, step: int) -> TrainingError:
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    finer = next((n for n in range(accumulate + 1, batch + 1) if batch % n == 0), None)
    ways = [f"--train.accumulate {finer}"] * (finer is not None)
    ways += ["--plan.remat full"] * (recipe.plan.remat != "full")
    return TrainingError(
        f"out of memory in step {step + 1}: {bytes_(prediction.memory.total)} were predicted and "
        f"{bytes_(prediction.free_bytes)} were free at the start. Other programs may have taken memory since. "
        f"The same command goes on from the last checkpoint{', with less memory if you add ' * bool(ways)}"
        f"{' or '.join(ways)}; a smaller batch or model needs another --out"
    )


def open_run(
    recipe: Recipe, model: LoadedModel | None = None, processes: int | None = None
) -> tuple[Recipe, Shards, Start, torch.device]:
    """Open the data and choose the model to start from and the device. The recipe's steps are within its epochs, and its
    adapter trains a new head, too.

    Args:
        processes: of the run; None: those that were started.

    Raises:
        LubanError: anything that is wrong with the recipe, the data or the plan.
    """
    if not recipe.data.path:
        raise UsageError("no data to train on: give --data.path SHARDS (made by luban data pack)")
    recipe = for_processes(recipe, process_count() if processes is None else processes)
    device = choose_device(recipe.train.device)
    if recipe.train.precision == "fp8":
        require_float8(device)
    if recipe.train.precision == "bf16" and not multiplies_bf16(device):
        warn("this processor has no bf16 instructions: --train.precision fp32 is about three times as fast")
    shards = recipe.trained(Shards.open(recipe.data.path, "train", verify=recipe.data.verify))
    start = choose_start(recipe, shards, model)
    recipe = replace(recipe, adapter=start.adapter)
    check_settings(recipe)
    check_plan(recipe.plan, start.spec, adapter=recipe.adapter)
    return within_epochs(recipe, shards), shards, start, device


def for_processes(recipe: Recipe, processes: int) -> Recipe:
    """The recipe with its plan for so many processes. Raises ConfigError where plan or batch can't be divided so."""
    plan = recipe.plan.over(processes)
    plan.check_batch(recipe.train.batch_size, recipe.train.accumulate)
    plan.check_tokens(recipe.train.seq_len)
    recipe.check_rows(plan)
    return replace(recipe, plan=plan)


def check_settings(recipe: Recipe) -> None:
    """Raise ConfigError for settings of the recipe that its plan doesn't go with."""
    config, adapter = recipe.train, recipe.adapter
    check_run(
        recipe.plan,
        recipe.optim,
        precision=config.precision,
        masters=config.weights == "fp32",
        compiles=config.compile,
        clip=config.clip,
        adapted=adapter is not None,
        packed=adapter is not None and adapter.base != "float",
    )


def prepare(
    recipe: Recipe, model: LoadedModel | None = None, processes: int | None = None
) -> tuple[Recipe, Shards, Start, torch.device, Prediction]:
    """Open the data, choose the start and predict the run. Allocates no model and writes nothing."""
    opened = open_run(recipe, model, processes)
    return *opened, predict_run(*opened)


def predict_run(recipe: Recipe, shards: Shards, start: Start, device: torch.device) -> Prediction:
    if short := recipe.schedule.never_at_peak(recipe.train.steps):
        warn(short)
    return predict(recipe, start.spec, device, partial(_sample, recipe, shards))


def dry_run(recipe: Recipe, model: LoadedModel | None = None, *, processes: int = 1, picture: bool = False) -> None:
    """Print what the run will need, before anything is taken; raises what `train` would.

    Args:
        processes: of the run, which needn't be started; 1: as many as the plan needs.
        picture: draw the pipeline's schedule, too.
    """
    prepared = prepare(recipe, model, recipe.plan.processes if processes == 1 else processes)
    print("\n".join(prepared[-1].lines(picture=picture)))
    _require_memory(*prepared)


def _require_memory(recipe: Recipe, shards: Shards, start: Start, device: torch.device, prediction: Prediction) -> None:
    require_memory(recipe, start.spec, device, prediction, partial(_sample, recipe, shards))


def _sample(recipe: Recipe, shards: Shards, rows: int) -> Batch:
    """The first rows that the run will read."""
    loader = Loader(
        shards, batch_size=rows, seq_len=recipe.train.seq_len, seed=recipe.train.seed, packing=rows_of(recipe, shards)
    )
    return loader.batch(0)


def assemble(
    recipe: Recipe,
    shards: Shards,
    start: Start,
    device: torch.device,
    world: World | None = None,
    folder: Path | None = None,
) -> TrainerComponents:
    """Model, optimizer, data and step, in the order in which they depend on each other.

    Args:
        folder: of the run, for components that keep something there; these don't.
    """
    config, world = recipe.train, world or World()
    prepare_process(config, device, world)
    engine = make_engine(recipe, start, device, world)
    workers = recipe.data.workers if recipe.data.workers is not None else 2 * (device.type == "cuda")
    loader = Loader(
        shards,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        packing=rows_of(recipe, shards),
        workers=workers,
        rank=world.reader,
        world=world.plan.readers,
        micro_batches=config.accumulate * world.plan.microbatches,
    )
    tasks = {name: rows for name, (_, rows) in recipe.objective.tasks_of(loader.packing).items()}
    conflict = GradientConflict(tasks, config.batch_size, config.seed) if len(tasks) > 1 else None
    validator = make_validator(recipe, shards)
    return TrainerComponents(recipe, engine, TrainState(start.spec, engine), loader, validator, conflict)


def prepare_process(config: TrainConfig, device: torch.device, world: World) -> None:
    """Seeds, determinism and memory of this process, before a model is made in it."""
    seed_everything(config.seed)
    # processes that work on the same rows draw the same numbers
    torch.manual_seed(derive(config.seed, "process", world.reader) if world.reader else config.seed)
    set_determinism(config.deterministic, device)
    keep_freed_memory(device)
    torch.set_float32_matmul_precision("high")


def make_engine(recipe: Recipe, start: Start, device: torch.device, world: World | None = None) -> TrainEngine:
    """The model of `start`, ready to be trained as `recipe` says."""
    config, attention = recipe.train, AttentionBackend(recipe.train.kernel)
    model = build_model(start.spec, device="meta")
    if config.neftune:
        add_noise(model, config.neftune)
    if config.embedding_gradient < 1:
        shrink_gradient(model, config.embedding_gradient)
    measured = recipe.objective.measured()
    evaluation = measured.loss(model, attention) if measured != recipe.objective else None
    execution = Execution(
        device=device,
        precision=config.precision,
        masters=config.weights == "fp32",
        compile=config.compile,
        accumulate=config.accumulate,
        clip=config.clip,
        world=world or World(),
    )
    return apply(
        recipe.objective.loss(model, attention),
        recipe.plan,
        recipe.optim,
        execution=execution,
        init=config.seed if start.weights is None else start.weights,
        adapt=None if recipe.adapter is None else recipe.adapter.adapt,
        rates=None if recipe.adapter is None else rates_of,
        pack=None if recipe.adapter is None or recipe.adapter.base == "float" else recipe.adapter.pack_base,
        evaluation=evaluation,
    )


def rows_of(recipe: Recipe, shards: Shards) -> Packing:
    """The rows that the recipe's objective makes of a split."""
    return _packed(recipe.objective, shards, recipe.train.seq_len, recipe.train.seed, recipe.data.packing)


def within_epochs(recipe: Recipe, shards: Shards) -> Recipe:
    """The recipe, its steps lowered to those of `train.epochs` passes over the training split."""
    train = recipe.train
    if not train.epochs:
        return recipe
    steps = math.ceil(train.epochs * rows_of(recipe, shards).rows / train.batch_size)
    return replace(recipe, train=replace(train, steps=max(min(steps, train.steps), 1)))


@lru_cache(maxsize=2)  # predicting and training read the same ones
def _packed(objective: Objective, shards: Shards, seq_len: int, seed: int, packing: str) -> Packing:
    return objective.examples(shards, seq_len=seq_len, seed=seed, packing=packing)


def make_validator(recipe: Recipe, shards: Shards) -> Validator | None:
    train = recipe.train
    try:
        heldout = Shards.open(shards.path, "heldout")
        rows = None if recipe.objective.reads_whole_text else rows_of(recipe, heldout)
        validator = Validator(
            heldout,
            rows=rows,
            batch_size=train.batch_size // train.accumulate,
            seq_len=train.seq_len,
            batches=recipe.validation.batches * train.accumulate,  # the same rows, however they are cut
            tasks={} if rows is None else recipe.objective.tasks_of(rows),
        )
        validator.check()
    except DataError as error:
        warn(f"training without validation: {error}")
        return None
    return validator

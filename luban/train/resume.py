"""Identity of a run directory, and resuming or extending it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.checkpoint.manager import CheckpointManager
from luban.core.artifact import ArtifactWriter, as_parent, atomic_write, read_manifest
from luban.core.config import to_dict, to_toml
from luban.core.errors import ArtifactError, ConfigError, LubanError
from luban.core.log import say
from luban.core.resuming import Mark, marks, split_config
from luban.core.whole_directory import incomplete_path
from luban.data.shards import Shards
from luban.models.config import config_of
from luban.parallel.world import World
from luban.train.budget import TIMED, WARM, StepCount
from luban.train.recipe import Recipe
from luban.train.start import Start
from luban.train.state import TrainState

RECIPE = "recipe.toml"  # in the run directory: the whole configuration
VOLATILE = (RECIPE, "metrics.jsonl", "tensorboard/*", "profile/*", "rollouts/*")


def run_artifact(recipe: Recipe, out: Path, *, task: str, shards: Shards, start: Start) -> ArtifactWriter:
    """The run directory of `recipe`, not yet opened. Its identity leaves out the operational and numerical settings.

    Raises:
        ConfigError: it has trained more steps than `recipe` asks for.
    """
    defining, settings = split_config(recipe)
    further = [as_parent(f"shards of {name}", path) for name, path in recipe.objective.further_data().items()]
    lengths = {path for path, mark in marks(recipe).items() if mark is Mark.LENGTH}
    art = ArtifactWriter(
        out,
        kind="run",
        config={"task": task, **defining, "model": config_of(start.spec), **_base(start)},
        settings=settings,
        parents=(as_parent("shards", shards.path), *further, *start.parents),
        resumable=True,
        extensible=lengths,
        seed=recipe.train.seed,
        volatile=VOLATILE,
    )
    done = _steps_done(out)
    if done > recipe.train.steps:
        raise ConfigError(
            f"{out} has trained {done} steps already, and train.steps is {recipe.train.steps}: give --train.steps {done} "
            f"or more, or another --out"
        )
    return art


def _base(start: Start) -> dict[str, str]:
    """The frozen model of a run of adapters, which trains over no other."""
    return {} if start.base is None else {"base_weights": start.base}


def _steps_done(out: Path) -> int:
    for folder in (out, incomplete_path(out)):
        try:
            return int(read_manifest(folder).figures.get("step", 0))
        except ArtifactError:
            continue
    return 0


@dataclass
class FollowedRun:
    """The run directory as the processes see it that don't write it. It has what training reads of an ArtifactWriter."""

    path: Path
    resumed: bool
    changed: dict[str, tuple[Any, Any]]
    figures: dict[str, Any]

    def note(self, **figures: Any) -> None:
        """Remember figures that the main process writes."""
        self.figures.update(figures)


@contextmanager
def opened_together(art: ArtifactWriter, world: World) -> Iterator[ArtifactWriter | FollowedRun]:
    """The run directory: written by the main process of the run, followed by the others.

    Raises:
        ArtifactError: in every process, where the main one can't open it.
    """
    if not world.is_main:
        seen: Any = world.agree(None)
        if isinstance(seen, str):
            raise ArtifactError(seen)
        yield FollowedRun(**seen)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(art)
        except LubanError as error:
            world.agree(str(error))
            raise
        world.agree({"path": art.path, "resumed": art.resumed, "changed": art.changed, "figures": dict(art.figures)})
        yield art


def write_recipe(art: ArtifactWriter, recipe: Recipe, start: Start) -> None:
    """Write the whole configuration into the run directory."""
    atomic_write(art.path / RECIPE, to_toml(to_dict(recipe) | {"model": config_of(start.spec)}))


def resume(art: ArtifactWriter | FollowedRun, recipe: Recipe, state: TrainState, start: Start) -> None:
    """Restore the last checkpoint of a run that is taken up again; note in the manifest which fields changed, and say what
    that does."""
    if not art.resumed:
        return
    found = CheckpointManager(art.path).resume(state.engine.world)
    if found is not None:
        step, checkpoint = found
        state.restore(checkpoint, recipe.train.seed)
        say(f"resuming after step {step}")
    note_changes(art, recipe, state, start)


def note_changes(art: ArtifactWriter | FollowedRun, recipe: Recipe, state: TrainState, start: Start) -> None:
    """Note in the manifest which fields of a run that is taken up again have changed, and say what that does."""
    if not art.changed:
        return
    step, marked = state.progress.step, marks(recipe)
    changes = [
        {"after_step": step, "field": path, "old": old, "new": new} for path, (old, new) in sorted(art.changed.items())
    ]
    for change in changes:
        numerical = marked.get(change["field"]) is Mark.NUMERICAL
        effect = ": from here on results differ by rounding from those of a run without the change" if numerical else ""
        say(f"{change['field']} was {change['old']!r}, now {change['new']!r}{effect}")
    if step and any(marked.get(path) is Mark.LENGTH for path in art.changed):
        _extend(art, recipe, step)
    art.note(changes=[*art.figures.get("changes", ()), *changes])
    if isinstance(art, ArtifactWriter):
        write_recipe(art, recipe, start)


def _extend(art: ArtifactWriter | FollowedRun, recipe: Recipe, step: int) -> None:
    """Say what another number of steps does to the schedule, and let a budget be measured anew."""
    old_steps: Any = art.changed.get("train.steps", (recipe.train.steps,))[0]
    old = StepCount(old_steps, **art.figures.get("steps_fixed", {})).total(step)
    art.figures["steps_fixed"] = {"fixed": None, "fixed_at": step + WARM + TIMED}
    new, lr = recipe.train.steps, recipe.optim.lr
    next_lr, before = (lr * recipe.schedule.factor(max(at, 0), n) for at, n in ((step, new), (step - 1, old)))
    say(
        f"training goes on from step {step} to step {new}, and the schedule is now that of {new} steps: the learning rate "
        f"of the next step is {next_lr:.3g}, that of the last step was {before:.3g}"
    )

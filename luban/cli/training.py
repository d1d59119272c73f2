"""What the verbs that train from a recipe share: a prediction, one process, or several that are started here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from luban.cli.elastic import train_elastic
from luban.cli.launch import launch
from luban.core.arguments import parse_recipe, without_processes
from luban.core.errors import UsageError
from luban.core.log import print_result

if TYPE_CHECKING:
    from luban.load.model import LoadedModel
    from luban.train.recipe import Recipe

R = TypeVar("R", bound="Recipe")
RECIPES = Path(__file__).parents[1] / "recipes"  # those that ship


def train_from_recipe(
    recipe: type[R],
    argv: Sequence[str],
    *,
    verb: str,
    about: str,
    examples: str,
    train: Callable[[R, Path, str], Path],
    pack: Callable[[R, Path], tuple[R, LoadedModel | None]] = lambda recipe, cache: (recipe, None),
    most_processes: int | None = None,
    elastic: bool = False,
) -> int:
    """Run a verb that trains; returns the exit code.

    `--dry-run` packs into a temporary folder and predicts. `--nproc N` packs beside the run and checks recipe, data and plan
    before N processes are started, so that a mistake is said once, by one process.

    Args:
        recipe: the class of the verb's recipes.
        train: recipe, run directory and the recipe's name → the finished run.
        pack: recipe and folder for what is packed → the recipe with its data packed, and the model that it starts from, where
            it has been loaded.
        most_processes: that a run can have; None: any number.
        elastic: whether runs of the verb may be elastic (`--elastic.enabled`).
    """
    from luban.align.start import packed_beside
    from luban.parallel.world import World, process_count
    from luban.train.elastic.claim import is_worker
    from luban.train.recipe import model_of_init
    from luban.train.run import dry_run, open_run

    call = parse_recipe(recipe, argv, verb=verb, about=about, examples=examples, shipped=RECIPES, adapt=model_of_init)
    processes = max(call.processes, process_count())
    if most_processes is not None and processes > most_processes:
        raise UsageError(f"luban {verb} runs in {most_processes} process: leave --nproc out")
    if not is_worker():  # whose agent has asked
        call.recipe.plan.check_used(processes)
    if call.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            ready, model = pack(call.recipe, Path(folder))
            dry_run(ready, model, processes=call.processes, picture=call.picture)
        return 0
    if call.recipe.elastic.enabled:
        if not elastic:
            raise UsageError(f"luban {verb} is not elastic: leave --elastic.enabled out")
        if process_count() > 1:
            raise UsageError("an elastic run starts its own workers: use --nproc instead of torchrun")
        return train_elastic(call, [verb, *without_processes(argv)])
    if call.processes > 1 and process_count() == 1:
        with packed_beside(call.out) as cache:
            ready, model = pack(call.recipe, cache)
            open_run(ready, model, call.processes)
        del ready, model  # the processes load their own
        return launch([verb, *without_processes(argv)], call.processes)
    print_result(train(call.recipe, call.out, call.name))
    World.leave()
    return 0

"""From a recipe to the agent of an elastic run: what is wrong is said before any worker is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from luban.core.errors import ConfigError, LubanError
from luban.train.elastic.agent import Agent, folder_of
from luban.train.elastic.config import check_elastic
from luban.train.elastic.refit import usable_workers
from luban.train.elastic.service import ADDRESS, ServiceSettings, read_settings
from luban.train.elastic.service_supervisor import Start, start_process
from luban.train.elastic.shared_memory import flash_root
from luban.train.elastic.wire import Client
from luban.train.recipe import Recipe
from luban.train.run import open_run


def settings_of_others(out: Path) -> ServiceSettings | None:
    """What the agents of other machines, which work for the run `out` already, were started with; None: there are none."""
    folder = folder_of(out)
    client = Client(folder / ADDRESS, patience=0.0)
    try:
        return read_settings(folder) if client("status", since=0)["nodes"] else None
    except LubanError:
        return None
    finally:
        client.close()


def agent_of(recipe: Recipe, out: Path, words: Sequence[str], workers: int, start: Start = start_process) -> Agent:
    """The agent that starts `workers` workers on this machine.

    Raises:
        LubanError: anything that is wrong with recipe, data or plan.
    """
    check_elastic(recipe.plan)
    flash_root(recipe.elastic.flash_folder)
    elastic, batch = recipe.elastic, recipe.train.batch_size
    known = settings_of_others(out)
    plan = recipe.plan.over(workers) if known is None else known.plan
    if recipe.spikes.action == "skip":
        raise ConfigError("elastic.enabled does not go with spikes.action skip, which leaves rows out: use report")
    if usable_workers(plan, batch, workers) < workers:
        raise ConfigError(f"{workers} workers need a row each, and train.batch_size is {batch}: start fewer")
    open_run(replace(recipe, plan=replace(plan, replicate=1, shard=1)), processes=1)
    settings = known or ServiceSettings(
        plan=plan,
        batch_size=batch,
        min_workers=elastic.min_workers,
        join_seconds=elastic.join_seconds,
        silent_seconds=elastic.silent_seconds,
        hang_seconds=elastic.hang_seconds,
        balance=elastic.balance,
        host=elastic.host,
    )
    return Agent(words, out, workers, settings, elastic, start)

"""Elastic runs on the command line: this process becomes a worker, or the agent that starts and watches workers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from luban.core.arguments import RecipeCall, run_directory, without_processes
from luban.core.log import print_result

if TYPE_CHECKING:
    from luban.train.elastic.agent import Agent
    from luban.train.recipe import Recipe

R = TypeVar("R", bound="Recipe")


def take_place(verb: str, argv: Sequence[str]) -> int | None:
    """What an elastic run's process does before it imports what takes seconds; None: there is more for it to do.

    A worker claims its place, a spare one waits for its name. A command whose agent was killed takes over the workers that it has
    left, to the end of the run. Returns the exit code.
    """
    from luban.train.elastic.claim import TAKEN, claim, told

    whose = told(_import_all)
    if whose is not None:
        return TAKEN if claim(*whose) is None else None
    out = None if {"--help", "-h"} & {*argv} else run_directory(argv)
    if out is None:
        return None
    from luban.train.elastic.agent import successor

    agent = successor(out, [verb, *without_processes(argv)])
    return None if agent is None else _watch(agent, out)


def train_elastic(call: RecipeCall[R], words: list[str]) -> int:
    """Train as a worker, where this process was started as one; else start and watch the workers of this machine.

    Args:
        words: of the command line, for workers.
    """
    from luban.train.elastic.claim import claim, told
    from luban.train.elastic.start import agent_of
    from luban.train.elastic.worker import train_worker

    whose = told(_import_all)
    if whose is not None and (worker := claim(*whose)) is not None:
        return train_worker(call.recipe, call.out, worker, name=call.name)
    return _watch(agent_of(call.recipe, call.out, words, call.processes), call.out)


def _watch(agent: Agent, out: Path) -> int:
    code = agent.run()
    if code == 0:
        print_result(out)
    return code


def _import_all() -> None:
    """Import what a worker will need."""
    for name in ("luban.train.elastic.worker", "torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)

"""A worker of an elastic run: one process that trains in generation after generation of workers."""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from luban.checkpoint.manager import CheckpointManager
from luban.core.artifact import ArtifactWriter
from luban.core.errors import LubanError, TrainingError
from luban.core.hashing import code_version, data_sha256
from luban.core.log import mute, say
from luban.core.resuming import split_config
from luban.core.units import counted
from luban.data.shards import Shards
from luban.parallel.world import World, is_lost_connection
from luban.train.elastic.claim import REFUSED, Worker, stacks_of
from luban.train.elastic.flash import FlashMemory, Owner, flash_at, newest_flash
from luban.train.elastic.link import Link, RankAssignment
from luban.train.elastic.loop import ElasticLoop, LeasedLoader, MembershipChange
from luban.train.elastic.refit import keeps_parts, refit
from luban.train.elastic.service import read_settings
from luban.train.elastic.shared_memory import flash_base, neighbour, remove_flash
from luban.train.elastic.wire import OperationFailed, Refused
from luban.train.goodput import Goodput
from luban.train.interrupt import Interrupted, StopRequest
from luban.train.loop import TrainerComponents
from luban.train.recipe import Recipe
from luban.train.resume import FollowedRun, note_changes, opened_together, run_artifact
from luban.train.run import (
    begin,
    is_begun,
    make_engine,
    make_validator,
    open_run,
    predict_run,
    prepare_process,
    rows_of,
)
from luban.train.start import Start
from luban.train.state import TrainState
from luban.train.timed import time_communication

Opened = tuple[Recipe, Shards, Start, torch.device]  # with the recipe of a generation
LAST_WORDS = 5.0  # seconds in which the service must take the reason for which a worker ends
MEETING = timedelta(seconds=30)  # in which the processes of a generation must find each other


def train_worker(recipe: Recipe, out: Path, worker: Worker, *, name: str) -> int:
    """Train as one worker of a run until it ends; returns the exit code. The service keeps how the run has ended."""
    goodput = Goodput()
    stacks = open(
        stacks_of(worker.name, worker.folder), "a"
    )  # open until the process ends: a signal handler writes to it
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    link = Link(worker, goodput)
    with link.beating(), StopRequest() as stop:
        try:
            ElasticRun(recipe, Path(out), link, name).train(stop)
        except Interrupted as interrupted:
            link.client("end", code=interrupted.exit_code, message=str(interrupted))
            return interrupted.exit_code
        except Refused as refused:  # of this worker, not of the run
            say(f"luban: {refused}")
            return REFUSED
        except LubanError as error:
            if link.ended is None:
                link.client.patience = LAST_WORDS
                with suppress(TrainingError, OperationFailed):
                    link.client("end", code=error.exit_code, message=str(error))
            return error.exit_code
        if stop.signal:
            return 128 + stop.signal
        return int(link.ended["code"]) if link.ended else 0


@dataclass
class Kept:
    """What a worker keeps from one generation to the next."""

    parts: TrainerComponents | None = None


class ElasticRun:
    """A run as one of its workers sees it."""

    def __init__(self, recipe: Recipe, out: Path, link: Link, name: str):
        self.recipe, self.out, self.link, self.name = recipe, out, link, name
        self.version = {
            "luban": code_version(),
            "torch": torch.__version__,
            "recipe": split_config(recipe)[0],
        }  # of which none may differ
        alone = replace(recipe, plan=replace(recipe.plan, replicate=1, shard=1))
        self.opened = open_run(alone, processes=1)
        self.plan = read_settings(link.worker.folder).plan
        self.kept = Kept()
        self.base = flash_base(recipe.elastic.flash_folder, out)

    def train(self, stop: StopRequest) -> None:
        """Take part in generations until the run has ended, or goes on without this worker."""
        while (assignment := self.link.await_rank(self.version, stop)) is not None:
            if assignment.replaces and self.kept.parts is None:
                self.link.goodput.lose_all()
            try:
                with self.link.at_work(assignment):
                    self._generation(assignment)
                return
            except Interrupted:
                raise
            except Exception as error:
                over = isinstance(error, MembershipChange) or self.link.is_over(assignment, error)
                if not over and not is_lost_connection(error):
                    raise
                if self.link.ended is not None:
                    return
            finally:
                self.link.disconnect()
            self.link.goodput.enter("lost")

    def _generation(self, assignment: RankAssignment) -> None:
        """Train as a member of a generation, to the end of the run."""
        recipe = self._fitted(assignment)
        world = self._meet(assignment, recipe)
        mute(not world.is_main)
        art = run_artifact(recipe, self.out, task="pretrain", shards=self.opened[1], start=self.opened[2])
        if not world.agree(art.finished()):
            opened = (recipe, *self.opened[1:])
            with opened_together(art, world) as art:
                if not is_begun(art):
                    self._forget_earlier_runs(world, assignment)
                    begin(art, opened, predict_run(*opened), world, self.name)
                self._train(art, opened, world, assignment)
        if world.is_main:
            self.link.client("end", code=0, message=str(self.out))
        else:
            self.link.wait_for_end(assignment)

    def _forget_earlier_runs(self, world: World, assignment: RankAssignment) -> None:
        """Copies and accounts of a run that was in this directory before do not belong to one that has not begun, whether its
        directory is new or its first processes were killed while they wrote it."""
        if world.is_main:
            for folder in self.base.iterdir():
                remove_flash(self.base, folder.name)
            self.link.client("run_begins", generation=assignment.generation)

    def _train(
        self, art: ArtifactWriter | FollowedRun, opened: Opened, world: World, assignment: RankAssignment
    ) -> None:
        recipe = opened[0]
        parts = self._parts(opened, world, assignment)
        parts = self._restore(art, opened, parts, world, assignment)
        note_changes(art, recipe, parts.state, opened[2])
        flash = FlashMemory(self._folders(assignment), Owner(assignment.generation, assignment.rank, assignment.size))
        loop = ElasticLoop(
            art, parts, link=self.link, assignment=assignment, flash=flash, flash_every=recipe.elastic.flash_every
        )
        loop.run()
        self.link.client("trained", generation=assignment.generation, steps=parts.state.progress.step)
        figures = self.link.client("figures")
        art.note(goodput=figures.pop("goodput"), elastic=figures)

    def _fitted(self, assignment: RankAssignment) -> Recipe:
        """The recipe with its plan for the workers of this generation."""
        opened = self.opened[0]
        train = opened.train
        found = refit(self.plan, train.batch_size, train.accumulate, assignment.size)
        return replace(opened, plan=found.plan, train=replace(train, accumulate=found.accumulate))

    def _meet(self, assignment: RankAssignment, recipe: Recipe) -> World:
        local = [worker for worker in assignment.workers if worker.rpartition("/")[0] == self.link.worker.node]
        os.environ.update(
            WORLD_SIZE=str(assignment.size),
            RANK=str(assignment.rank),
            LOCAL_WORLD_SIZE=str(len(local)),
            LOCAL_RANK=str(local.index(self.link.worker.name)),
        )
        if assignment.size == 1:
            return World()
        store = self.link.store(assignment, self.recipe.elastic.host, MEETING)
        return World.join(recipe.plan, self.opened[3], {"version": data_sha256(self.version)}, store)

    def _parts(self, opened: Opened, world: World, assignment: RankAssignment) -> TrainerComponents:
        """Model, optimizer and data of this generation: those of the last one with other processes, where these can use them;
        else new ones, whose state is restored."""
        recipe, shards, start, device = opened
        before = self.kept.parts
        if before is not None and keeps_parts(before.recipe.plan, recipe.plan):
            engine = before.engine
            time_communication(engine, self.link.goodput, world)
            engine.abandon_step()
            engine.accumulate = recipe.train.accumulate
        else:
            before = self.kept.parts = None  # free its memory first
            prepare_process(recipe.train, device, world)
            engine = make_engine(recipe, start, device, world)
        workers = recipe.data.workers if recipe.data.workers is not None else 2 * (device.type == "cuda")
        loader = LeasedLoader(
            self.link,
            assignment,
            recipe.train.accumulate,
            shards=shards,
            batch_size=recipe.train.batch_size,
            seq_len=recipe.train.seq_len,
            seed=recipe.train.seed,
            packing=rows_of(recipe, shards),
            workers=workers,
        )
        state = TrainState(start.spec, engine)
        self.kept.parts = TrainerComponents(recipe, engine, state, loader, make_validator(recipe, shards))
        return self.kept.parts

    def _restore(
        self,
        art: ArtifactWriter | FollowedRun,
        opened: Opened,
        parts: TrainerComponents,
        world: World,
        assignment: RankAssignment,
    ) -> TrainerComponents:
        """Go on from the newest state: the copies in memory, or the last checkpoint. The service hands out the rows after it."""
        flash = newest_flash(self.base) if world.is_main and art.resumed else None
        known = world.agree((flash.step, flash.owner.generation) if flash is not None else None)
        checkpoints, seed = CheckpointManager(art.path), opened[0].train.seed
        saved = world.agree(checkpoints.steps()) if art.resumed else []
        if known is not None and known[0] >= max(saved, default=0):
            step = known[0]
            parts.state.restore(flash_at(self.base, *known), seed)
            if world.is_main:
                checkpoints.remove_unfinished()
        else:
            found = checkpoints.resume(world) if art.resumed else None
            step = 0
            if found is not None:
                step = found[0]
                parts.state.restore(found[1], seed)
            elif (
                assignment.generation > 1
            ):  # weights may be trained, and all make theirs anew: that takes messages of all
                self.kept = Kept()
                parts = self._parts(opened, world, assignment)
        self.link.goodput.go_back(step)
        if world.is_main:
            self.link.client("spent_before", recorded=art.figures.get("goodput", {}))
            undone = self.link.client("resume", generation=assignment.generation, step=step)
            if assignment.generation > 1 or step:
                goes = "goes" if assignment.size == 1 else "go"
                again = f"{counted(undone, 'step')} {'is' if undone == 1 else 'are'} done again"
                say(f"{counted(assignment.size, 'worker')} {goes} on after step {step} ({again})")
        world.agree(None)
        return parts

    def _folders(self, assignment: RankAssignment) -> list[Path]:
        """Where this worker keeps its copies: in the memory of its node, and of the next one, where there are several."""
        own = self.link.worker.node
        other = neighbour(assignment.rank, [worker.rpartition("/")[0] for worker in assignment.workers])
        return [self.base / node for node in dict.fromkeys((own, other))]

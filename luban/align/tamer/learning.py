"""TAMER (Knox and Stone 2009): a model of a trainer's feedback, by which the agent acts.

The trainer sees actions and says, some time later, whether they were good. A delay's distribution says how probable it is that
a feedback is about a step; by these credits the features of recent steps are summed, and a linear model of the feedback is moved
towards what was said. The agent takes the action whose predicted feedback is highest. There is no return: a trainer's feedback
is a judgement of the action that already looks ahead, so rewards of later steps count nothing (γ = 0).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from luban.align.tamer.delay import Delay
from luban.align.tamer.gridworld import MOVES, Cell, Gridworld, success_rate
from luban.core.artifact import ArtifactWriter, write_json
from luban.core.errors import ConfigError
from luban.core.jsonl import write_rows
from luban.core.seeding import generator


@dataclass(frozen=True)
class Step:
    """An action, and when it could be seen."""

    cell: Cell
    action: int
    reached: Cell
    start: float  # seconds
    end: float  # seconds


@dataclass(frozen=True)
class Feedback:
    """What a trainer said."""

    time: float  # seconds
    value: float  # above 0: good, below 0: bad


class Trainer(Protocol):
    """Watches and gives feedback."""

    def watch(self, step: Step | None, start: float, end: float) -> list[Feedback]:
        """Feedback given between two times, of a step that begins at the first; None: nothing happens until `end`."""
        ...


@dataclass(frozen=True, kw_only=True)
class TamerConfig:
    """How the agent learns."""

    rate: float = 0.1  # step size of the model of feedback
    step_seconds: float = 0.8  # that a step takes
    most_steps: int = 60  # of an episode
    starts: Literal["farthest", "drawn"] = "farthest"  # episodes begin in the cell farthest from the goal, or in any
    seed: int = 0  # of drawn starts, and of choices between equally good actions

    def __post_init__(self):
        if not 0 < self.rate <= 1 or self.step_seconds <= 0 or self.most_steps < 1:
            raise ConfigError("rate is above 0 and at most 1, step_seconds above 0, most_steps at least 1")


@dataclass(frozen=True)
class Episode:
    """What happened from a start to the goal, or to the last step."""

    steps: int
    reached: bool
    shortest: int  # steps of a shortest path
    feedback: int  # how often the trainer said something


class Tamer:
    """The agent.

    Args:
        delay: by which feedback is credited to steps.
    """

    def __init__(self, world: Gridworld, delay: Delay, config: TamerConfig):
        self.world, self.delay, self.config = world, delay, config
        self.weights = np.zeros(world.features)
        self.recent: deque[Step] = deque()
        self.heard: list[Feedback] = []  # all of it
        self.now = 0.0  # seconds
        self.episodes = 0

    def predicted(self, cell: Cell) -> np.ndarray:
        """(actions,) predicted feedback in a cell."""
        return np.array([self.weights[self.world.active(cell, action)].sum() for action in range(len(MOVES))])

    def policy(self) -> np.ndarray:
        """(cells, actions) predicted feedback everywhere, cells row by row."""
        size = self.world.size
        return np.array([self.predicted((row, column)) for row in range(size) for column in range(size)])

    def learn(self, said: Feedback) -> None:
        """Move the prediction of the credited steps' summed features towards what was said."""
        features = np.zeros(len(self.weights))
        for step in self.recent:
            features[self.world.active(step.cell, step.action)] += self.delay.credit(step.start, step.end, said.time)
        self.weights += self.config.rate * (said.value - self.weights @ features) * features

    def episode(self, trainer: Trainer) -> Episode:
        """One episode from a drawn start, learning from what the trainer says of it."""
        config = self.config
        rng = generator(config.seed, "episode", self.episodes)
        self.episodes += 1
        cell = first = self.world.starts[-1]
        if config.starts == "drawn":
            cell = first = self.world.starts[int(rng.integers(len(self.world.starts)))]
        count = said = 0
        while cell != self.world.goal and count < config.most_steps:
            values = self.predicted(cell)
            action = int(rng.choice(np.flatnonzero(values == values.max())))
            step = Step(cell, action, self.world.step(cell, action), self.now, self.now + config.step_seconds)
            self.recent.append(step)
            said += self._heard(trainer.watch(step, step.start, step.end))
            self.now, cell, count = step.end, step.reached, count + 1
        pause = self.now + self.delay.longest  # for what the trainer still has to say
        said += self._heard(trainer.watch(None, self.now, pause))
        self.now = pause
        self.recent.clear()
        return Episode(count, cell == self.world.goal, self.world.distance[first], said)

    def _heard(self, feedback: Sequence[Feedback]) -> int:
        for each in feedback:
            while self.recent and self.recent[0].end < each.time - self.delay.longest:
                self.recent.popleft()
            self.learn(each)
        self.heard += feedback
        return len(feedback)


class Oracle:
    """A trainer that knows the shortest paths: good is what leads nearer to the goal. It takes its time, as people do.

    Args:
        attention: fraction of the steps it says something about.
        errors: fraction of its feedback that has the wrong sign.
        delay: (least, most) seconds from a step to what it says, any between them as probable.
    """

    def __init__(
        self,
        world: Gridworld,
        *,
        attention: float = 1.0,
        errors: float = 0.0,
        delay: tuple[float, float] = (0.2, 0.8),
        seed: int = 0,
    ):
        if not 0 < attention <= 1 or not 0 <= errors < 0.5:
            raise ConfigError(f"attention is in (0, 1] and errors in [0, 0.5), {attention} and {errors} given")
        self.world, self.attention, self.errors, self.delay = world, attention, errors, delay
        self.rng = generator(seed, "oracle")
        self.waiting: list[Feedback] = []  # not said yet

    def watch(self, step: Step | None, start: float, end: float) -> list[Feedback]:
        """See `Trainer`."""
        if step is not None and self.rng.random() < self.attention:
            nearer = self.world.distance[step.reached] < self.world.distance[step.cell]
            value = 1.0 if nearer != (self.rng.random() < self.errors) else -1.0
            self.waiting.append(Feedback(start + float(self.rng.uniform(*self.delay)), value))
        said = sorted((each for each in self.waiting if each.time < end), key=lambda each: each.time)
        self.waiting = [each for each in self.waiting if each.time >= end]
        return said


def teach(tamer: Tamer, trainer: Trainer, episodes: int) -> list[tuple[Episode, float]]:
    """Episodes, each with the success rate of acting greedily without a trainer after it, from the cells that episodes begin in. A
    person may end it by KeyboardInterrupt, which leaves out the episode that was begun."""
    world, found = tamer.world, []
    starts = world.starts if tamer.config.starts == "drawn" else world.starts[-1:]
    for _ in range(episodes):
        try:
            episode = tamer.episode(trainer)
        except KeyboardInterrupt:
            break
        found.append((episode, success_rate(world, tamer.policy(), starts, tamer.config.most_steps)))
    return found


def save(tamer: Tamer, found: Sequence[tuple[Episode, float]], out: Path, config: dict[str, Any]) -> None:
    """Write episodes.jsonl, feedback.jsonl (times and values) and policy.json (predicted feedback by cell and action)."""
    with ArtifactWriter(out, kind="tamer", config=config, seed=tamer.config.seed) as art:
        write_rows(art.path / "episodes.jsonl", [{**asdict(episode), "success": rate} for episode, rate in found])
        write_rows(art.path / "feedback.jsonl", [asdict(each) for each in tamer.heard])
        write_json(art.path / "policy.json", tamer.policy().tolist())
        art.note(episodes=len(found), feedback=len(tamer.heard), success=found[-1][1] if found else None)

"""TAMER: credits against drawn delays, the update against its formula, and an oracle that teaches in ten episodes."""

from __future__ import annotations

import io
import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evals_shared import read_json, read_lines

from luban.align.tamer.delay import Delay, GammaDelay, NoDelay, UniformDelay
from luban.align.tamer.gridworld import MOVES, Gridworld, success_rate
from luban.align.tamer.keyboard import Keyboard
from luban.align.tamer.learning import Feedback, Oracle, Step, Tamer, TamerConfig, teach
from luban.cli.main import main
from luban.core.artifact import open_artifact
from luban.core.errors import ConfigError
from luban.core.seeding import generator

WORLDS = range(30)


def taught(seed: int, delay: Delay, seconds: float, episodes: int = 10, **of_oracle) -> float:
    """Success without a trainer after some episodes with an oracle."""
    world = Gridworld(seed=seed)
    tamer = Tamer(world, delay, TamerConfig(seed=seed, step_seconds=seconds))
    return teach(tamer, Oracle(world, seed=seed, **of_oracle), episodes)[-1][1]


def q_learning(world: Gridworld, episodes: int, most_steps: int, seed: int, *, rate: float = 0.5) -> list[np.ndarray]:
    """(cells, actions) values after each episode of tabular Q-learning (Watkins 1989) from the farthest cell: a reward of 1 at the
    goal, discount 0.95, one action in ten at random."""
    values, rng = np.zeros((world.size**2, len(MOVES))), generator(seed, "q_learning")
    found = []
    for _ in range(episodes):
        cell = world.starts[-1]
        for _ in range(most_steps):
            here = values[cell[0] * world.size + cell[1]]
            best = int(rng.choice(np.flatnonzero(here == here.max())))
            action = int(rng.integers(len(MOVES))) if rng.random() < 0.1 else best
            cell = world.step(cell, action)
            done = cell == world.goal
            ahead = 1.0 if done else 0.95 * values[cell[0] * world.size + cell[1]].max()
            here[action] += rate * (ahead - here[action])
            if done:
                break
        found.append(values.copy())
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_free_cell_reaches_the_goal_by_the_distances_that_the_world_knows(seed):
    world = Gridworld(size=7, walls=0.4, seed=seed)
    assert len(world.distance) + len(world.walls) == 49 and world.goal not in world.walls
    for cell, distance in world.distance.items():
        near = [world.distance[world.step(cell, action)] for action in range(4)]
        assert distance == 0 if cell == world.goal else distance == 1 + min(near)


@pytest.mark.parametrize(
    "delay", [UniformDelay(), UniformDelay(least=0.0, most=1.5), GammaDelay(), GammaDelay(shape=4)]
)
def test_credits_are_the_probabilities_of_drawn_delays(delay):
    rng = np.random.default_rng()
    if isinstance(delay, UniformDelay):
        drawn = rng.uniform(delay.least, delay.most, 200_000)
    else:
        drawn = delay.least + rng.gamma(delay.shape, delay.scale, 200_000)
    for start, end in rng.uniform(0, 2, (5, 2)).cumsum(1):
        time = float(rng.uniform(start, end + 1.5))
        share = np.mean((time - drawn >= start) & (time - drawn < end))
        assert delay.credit(start, end, time) == pytest.approx(
            share, abs=0.006
        )  # five standard errors of 200,000 draws
    edges = np.linspace(0, 10, 41)
    whole = [delay.credit(a, b, 10.0) for a, b in itertools.pairwise(edges)]
    assert sum(whole) == pytest.approx(1, abs=1e-6) and min(whole) >= 0
    assert delay.cdf(delay.longest) >= 0.99


def test_an_update_is_the_gradient_step_of_the_credited_sum():
    world, rng = Gridworld(seed=3), np.random.default_rng()
    tamer = Tamer(world, UniformDelay(), TamerConfig(rate=0.25))
    tamer.weights = rng.normal(size=world.features)
    for i in range(3):
        cell, action = world.starts[int(rng.integers(len(world.starts)))], int(rng.integers(4))
        tamer.recent.append(Step(cell, action, world.step(cell, action), 0.3 * i, 0.3 * (i + 1)))
    before, said = tamer.weights.copy(), Feedback(1.0, -1.0)
    features = np.zeros(world.features)
    for step in tamer.recent:
        low, high = (
            max(0.2, 1.0 - step.end),
            min(0.8, 1.0 - step.start),
        )  # of the delays that lead from this step to 1 s
        for place in world.active(step.cell, step.action):
            features[place] += max(0.0, high - low) / 0.6

    def loss(weights):
        return 0.5 * (said.value - weights @ features) ** 2

    tamer.learn(said)
    slope = np.array([(loss(before + e) - loss(before - e)) / 2e-6 for e in 1e-6 * np.eye(world.features)])
    assert np.allclose(tamer.weights, before - 0.25 * slope, atol=1e-6)


def test_an_oracle_teaches_in_ten_episodes_what_the_goal_alone_does_not():
    for delay in (UniformDelay(), GammaDelay()):
        assert np.mean([taught(seed, delay, 0.8) for seed in WORLDS]) >= 0.95
    alone = []
    for seed in WORLDS:
        world = Gridworld(seed=seed)
        alone.append(success_rate(world, q_learning(world, 10, 60, seed)[-1], world.starts[-1:], 60))
    assert np.mean(alone) <= 0.5


def test_feedback_about_earlier_steps_needs_its_credit():
    credited, not_credited = (np.mean([taught(s, d, 0.3) for s in WORLDS]) for d in (UniformDelay(), NoDelay()))
    assert credited >= 0.95 and not_credited <= 0.85


def test_a_trainer_that_errs_and_looks_away_teaches_still():
    assert np.mean([taught(s, UniformDelay(), 0.8, 20, errors=0.1, attention=0.7) for s in WORLDS]) >= 0.7


def test_keys_are_feedback_at_their_time():
    world = Gridworld(size=3, walls=0.0)
    read, write = os.pipe()
    screen = io.StringIO()
    keyboard = Keyboard(world, read, screen)
    step = Step(world.starts[0], 1, world.step(world.starts[0], 1), 5.0, 5.01)
    os.write(write, b"+x-")
    said = keyboard.watch(step, 5.0, 5.01)
    assert [each.value for each in said] in ([1.0, -1.0], [1.0]) and all(5.0 <= each.time <= 5.01 for each in said)
    assert "last said" in screen.getvalue() and "*" in screen.getvalue()
    os.write(write, b"q")
    with pytest.raises(KeyboardInterrupt):
        keyboard.watch(None, 6.0, 16.0)
    os.close(read)
    os.close(write)


def test_a_person_in_a_terminal_plays_to_the_end_and_what_they_said_is_kept(tmp_path):
    leader, follower = pty.openpty()
    words = [
        "tamer",
        "--size",
        "3",
        "--walls",
        "0",
        "--episodes",
        "1",
        "--step-seconds",
        "0.01",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.Popen([sys.executable, "-m", "luban", *words], stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # nobody has the other side open
            break
        if not part:
            break
        shown += part
        os.write(leader, b"+-")
    os.close(leader)
    assert done.wait() == 0 and b"+ or g: good" in shown and b"episode  1:" in shown
    assert {each["value"] for each in read_lines(tmp_path / "out" / "feedback.jsonl")} == {1.0, -1.0}


def test_the_verb_teaches_and_keeps_what_was_learned(tmp_path, capsys):
    assert main(["tamer", "--oracle", "--episodes", "4", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("episode") == 4
    figures = open_artifact(tmp_path / "out", "tamer").figures
    assert figures["episodes"] == 4 == len(read_lines(tmp_path / "out" / "episodes.jsonl"))
    policy, world = read_json(Path(tmp_path / "out" / "policy.json")), Gridworld()
    assert np.array(policy).shape == (36, len(MOVES))
    assert success_rate(world, policy, world.starts[-1:], 60) == figures["success"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a person needs a terminal"),
        (["--oracle", "--errors", "0.7"], "errors in [0, 0.5)"),
        (["--oracle", "--size", "1"], "2 to 40 rows"),
        (["--oracle", "--rate", "0"], "rate is above 0"),
        (["--oracle", "--episodes", "0"], "--episodes must be at least 1"),
    ],
)
def test_what_is_not_right_is_refused_in_one_line(words, said, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["tamer", *words]) == 2
    printed = capsys.readouterr().err
    assert said in printed and len(printed.strip().splitlines()) == 1


def test_delays_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="least < most"):
        UniformDelay(least=1.0, most=0.5)
    with pytest.raises(ConfigError, match="scale above 0"):
        GammaDelay(scale=0.0)

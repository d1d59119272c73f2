"""Every second of a run belongs to one kind, and what is done again is lost."""

from __future__ import annotations

import random

import pytest
from clock import Clock

from luban.train.elastic.accounts import Accounts
from luban.train.elastic.database import open_database
from luban.train.goodput import KINDS, Goodput, added


@pytest.mark.parametrize("seed", range(3))
def test_kinds_add_up_to_the_wall_clock(seed):
    draw, clock = random.Random(seed), Clock()
    goodput, step = Goodput(clock=clock), 0
    for _ in range(300):
        match draw.choice(["enter", "spent", "finished", "back"]):
            case "enter":
                goodput.enter(draw.choice(list(KINDS)))
            case "spent":
                with goodput.spent(draw.choice(list(KINDS))):
                    clock.advance(draw.random())
            case "finished":
                step += 1
                goodput.finished(step)
            case "back":
                step = max(step - draw.randint(0, 3), 0)
                goodput.go_back(step)
        clock.advance(draw.random())
        assert sum(goodput.seconds().values()) == pytest.approx(clock())


def test_steps_that_are_done_again_are_lost():
    clock = Clock()
    goodput = Goodput(clock=clock)
    clock.advance(2)
    for step in (1, 2, 3):
        goodput.enter("compute")
        clock.advance(1)
        with goodput.spent("communication"):
            clock.advance(0.5)
        goodput.finished(step)
    goodput.enter("compute")
    clock.advance(0.25)  # in the fourth step
    goodput.enter("lost")
    clock.advance(4)
    goodput.go_back(2)
    wanted = {"idle": 2, "compute": 2, "communication": 1, "lost": 1.5 + 0.25 + 4, "data": 0, "checkpoint": 0}
    assert goodput.seconds() == wanted
    goodput.go_back(0)  # to the start
    assert goodput.seconds() == {**dict.fromkeys(KINDS, 0), "idle": 2, "lost": 8.75}


def test_the_seconds_of_all_workers_with_the_time_between_a_lost_one_and_its_successor(tmp_path):
    wall, database = Clock(), open_database(tmp_path / "service.db")
    accounts = Accounts(database, wall)
    wall.advance(10)
    accounts.report("first", "a/0", {"compute": 6, "idle": 4})
    accounts.report("other", "a/1", {"compute": 5, "idle": 3})
    wall.advance(7)
    assert not accounts.known("a/0", "first") and accounts.known("a/0", "second")
    accounts.report("second", "a/0", {"lost": 2, "compute": 1})  # began 3 seconds ago, 4 after the last report
    total = accounts.total()
    assert total == {**added({"compute": 12, "idle": 7, "lost": 2 + 4}), "wall": 10 + 8 + 4 + 3}
    assert sum(total[kind] for kind in KINDS) == total["wall"]
    accounts.begin_session()
    wall.advance(1000)  # nobody worked for the run
    accounts.report("third", "a/0", {"compute": 1})
    assert accounts.total()["wall"] == 26

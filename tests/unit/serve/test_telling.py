"""On a GPU requests are told of their tokens while the next forward runs: what they are told is the same."""

from __future__ import annotations

import random

import pytest
import torch

from luban import Engine, Sampling, load_model
from luban.serve.recorded import BlockTables
from luban.serve.request import Request


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


def engine_for(model, *, later: bool) -> Engine:
    engine = Engine(model, max_batch=4)
    engine.tells_later = later
    return engine


def told(engine: Engine, seed: int) -> list[tuple]:
    """What twelve random requests are told, and their results."""
    rng, found = random.Random(seed), []
    requests: list[tuple[Request, list]] = []
    for number in range(12):
        prompt = "".join(rng.choice("abcdef ") for _ in range(rng.randrange(1, 20)))
        settings = {"max_tokens": rng.randrange(1, 12), "seed": number, "n": rng.choice([1, 1, 2])}
        settings |= rng.choice([{}, {"stop": (rng.choice("etaoin"),)}, {"logprobs": 2}])
        deltas: list = []
        requests.append((engine.request(prompt, Sampling(**settings), deltas.append), deltas))
    for request, _ in requests:
        engine.submit(request)
    while engine.step():
        pass
    for request, deltas in requests:
        assert request.done and "".join(d.text for d in deltas if d.choice == 0) == request.result.choices[0].text
        found.append((deltas, request.result.choices))
    return found


def test_what_requests_are_told_does_not_depend_on_when(model):
    seed = random.randrange(2**32)
    assert told(engine_for(model, later=True), seed) == told(engine_for(model, later=False), seed), seed


@pytest.mark.parametrize("later", [True, False])
def test_when_they_are_told(model, later):
    """Of a step's token in the next step, if there is one and it is to be so."""
    engine, deltas = engine_for(model, later=later), []
    engine.submit(engine.request("ab", Sampling(max_tokens=3, temperature=0, ignore_eos=True), deltas.append))
    counts = []
    while engine.step():
        counts.append(len(deltas))
    assert counts == ([0, 1] if later else [1, 2]) and len(deltas) == 3


def test_a_step_that_breaks_loses_no_finished_request(model, monkeypatch):
    engine = engine_for(model, later=True)
    sampling = Sampling(max_tokens=1, temperature=0, ignore_eos=True)
    short, long = engine.request("ab", sampling), engine.request("cd", Sampling(max_tokens=9, ignore_eos=True))
    for request in (short, long):
        engine.submit(request)
    assert engine.step() and not short.done

    def broken(meanwhile):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.batch, "next_tokens", broken)
    with pytest.raises(RuntimeError) as error:
        engine.step()
    engine.fail(error.value)
    assert short.result.choices[0].finish_reason == "length" and len(short.result.text) > 0 and short.error is None
    assert long.error is error.value


def test_the_device_has_the_tables_that_were_written():
    """Whatever was written before: in the same rows or others, longer, shorter or changed in the middle."""
    rng = random.Random(random.randrange(2**32))
    tables, held = BlockTables(6, 8, torch.device("cpu")), [[] for _ in range(6)]
    for _ in range(200):
        count = rng.randrange(1, 7)
        for row in range(count):
            match rng.randrange(5):
                case 0:
                    held[row] = [rng.randrange(100) for _ in range(rng.randrange(1, 9))]
                case 1 if held[row]:
                    held[row][rng.randrange(len(held[row]))] = rng.randrange(100)  # in place, as copy-on-write does
                case 2 if len(held[row]) < 8:
                    held[row].append(rng.randrange(100))
            held[row] = held[row] or [0]
        tables.write(held[:count])
        for row in range(count):
            assert tables.device[row, : len(held[row])].tolist() == held[row]

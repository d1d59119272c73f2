"""On a GPU decoding goes ahead of the host: the same tokens as in order, and nothing that is submitted waits for the device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import luban
from luban import Sampling
from luban.load.model import LoadedModel
from luban.models.spec import uniform
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.serve.decode_ahead import DecodeAhead
from luban.serve.paged import PagedBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    spec = uniform(
        vocab_size=97,
        width=128,
        context=300,
        layers=2,
        mixer=Grouped(heads=4, kv_heads=2),
        init=NormalInit(std=0.2),
    )
    module = luban.build_model(spec, device="cuda")
    return LoadedModel(spec=spec, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


def settings(number: int) -> Sampling:
    """Greedy and drawn ones, some of which end by a token."""
    drawn = ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20})[number % 2]
    ends = ({}, {"stop_token_ids": (5, 6, 7)})[number // 2 % 2]
    return Sampling(max_tokens=20 + number, seed=number, ignore_eos=True, **drawn, **ends)


@pytest.mark.parametrize("slots", [2**13, 40 * 16], ids=["", "little memory"])
def test_the_tokens_are_those_in_order(model, slots):
    rng, found = random.Random(4), []
    prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 30, 100]))] for _ in range(30)]
    for ahead in (True, False):
        engine = luban.Engine(model, cache_bytes=2**24)
        held = slots * engine.batch.budget.slot_bytes
        engine.batch = PagedBatch(model.module, cache_bytes=held, max_batch=16)
        assert engine.batch.runs_ahead
        engine.batch.runs_ahead = ahead
        requests = [engine.request(prompt, settings(number)) for number, prompt in enumerate(prompts)]
        for number, request in enumerate(requests):
            engine.submit(request)
            for _ in range(number % 3):
                engine.step()
        while engine.step():
            pass
        assert engine.batch.scheduler.manager.free == engine.batch.scheduler.manager.blocks
        assert not engine.batch.runner.graphs._broken
        found.append([request.result.choices[0].token_ids for request in requests])
    assert found[0] == found[1]


def test_what_is_submitted_ahead_does_not_wait_for_the_device(model, monkeypatch):
    """Sequences leave on the way, and blocks are added; torch is told to refuse whatever would wait."""
    engine, followed = luban.Engine(model, cache_bytes=2**24, max_batch=8), []
    rng, follow = random.Random(6), DecodeAhead.submit_next
    prompts = [[rng.randrange(97) for _ in range(8)] for _ in range(8)]
    sampling = [Sampling(max_tokens=30 + n, temperature=float(n % 2), seed=n, ignore_eos=True) for n in range(8)]

    def run() -> None:
        for prompt, each in zip(prompts, sampling, strict=True):
            engine.submit(engine.request(prompt, each))
        while engine.step():
            pass

    def refusing(self, flight, scheduler, runner):
        torch.cuda.set_sync_debug_mode("error")
        try:
            followed.append(follow(self, flight, scheduler, runner))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return followed[-1]

    run()  # every size is recorded, which waits
    failed, original = [], engine.batch.runner.run

    def watched(*arguments, **named):
        try:
            return original(*arguments, **named)
        except Exception as error:  # the engine would read the tokens again
            failed.append(error)
            raise

    monkeypatch.setattr(engine.batch.runner, "run", watched)
    monkeypatch.setattr(DecodeAhead, "submit_next", refusing)
    run()
    assert not failed and sum(each is not None for each in followed) > 30

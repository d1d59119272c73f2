"""Forwards that are submitted before the host knows the last one's tokens give what they give when it knows them."""

from __future__ import annotations

import random

import pytest
import torch

from luban import Engine, Sampling, Structure, load_model
from luban.generate.paged_cache import PagedCache
from luban.serve.decode_ahead import DecodeAhead
from luban.serve.decode_graph import DecodeGraphs
from luban.serve.memory import slot_bytes
from luban.serve.model_runner import ModelRunner
from luban.serve.paged import PagedBatch
from luban.serve.request import Request
from luban.serve.scheduler import Chunk, SequenceState

ENDS = tuple(range(97, 103))  # six bytes that end a text where a request says so


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


def engine_for(model, *, ahead: bool, **options) -> Engine:
    engine = Engine(model)
    batch = engine.batch = PagedBatch(model.module, **options)
    batch.runs_ahead = ahead
    return engine


def settings(rng: random.Random, number: int, share: float) -> dict:
    """Mostly those that need no host; a `share` that do."""
    plain = {"max_tokens": rng.choice([1, 2, 7, 25, 40]), "seed": number, "n": rng.choice([1, 1, 1, 3])}
    drawn = rng.choice([{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.3, "top_k": 9}])
    ends = rng.choice([{}, {}, {"stop_token_ids": ENDS}, {"stop": (rng.choice("etaoin"),)}, {"ignore_eos": True}])
    host = {}
    if rng.random() < share:
        host = rng.choice(
            [
                {"logprobs": 1},
                {"repetition_penalty": 1.3},
                {"min_tokens": min(3, plain["max_tokens"])},
                {"logit_bias": ((5, 2.0),)},
                {"structure": Structure.regex("[a-c]{1,5}")},
                {"prompt_logprobs": 0},
            ]
        )
    return plain | drawn | ends | host


class Work:
    """Random requests that come one by one; some are cancelled once so many tokens of theirs have been told."""

    def __init__(self, engine: Engine, seed: int):
        rng, self.deltas = random.Random(seed), []
        self.requests: list[Request] = []
        self.cancelled: set[int] = set()
        beginnings = ["".join(rng.choice("abcdef ") for _ in range(40)) for _ in range(2)]
        share = rng.choice([0.0, 0.15])
        arrivals = sorted(rng.randrange(60) for _ in range(14))
        for number in range(14):
            prompt = rng.choice(beginnings)[: rng.randrange(40)] + rng.choice("xyz")
            after = rng.choice([None, None, None, 0, 3])
            self.requests.append(self._request(engine, prompt, Sampling(**settings(rng, number, share)), after, number))
        step, left = 0, list(zip(arrivals, self.requests, strict=True))
        more = True
        while more or left:
            while left and left[0][0] <= step:
                engine.submit(left.pop(0)[1])
            more = engine.step()
            step += 1

    def _request(self, engine: Engine, prompt: str, sampling: Sampling, after: int | None, number: int) -> Request:
        told: list = []
        self.deltas.append(told)

        def listen(delta):
            told.append(delta)
            if after is not None and len(told) > after:
                self.cancelled.add(number)
                request.cancel()

        request = engine.request(prompt, sampling, listen)
        return request


@pytest.mark.parametrize("later", [False, True], ids=["", "told later"])
def test_random_work_gives_the_same_texts(model, monkeypatch, later):
    """With cancellations, end tokens, stop strings, preemption, prefix hits, and requests that need the host among others."""
    seed = random.randrange(2**32)
    print("seed", seed)
    followed = []
    follow = DecodeAhead.submit_next

    def counted(self, flight, scheduler, runner):
        following = follow(self, flight, scheduler, runner)
        followed.append(following is not None)
        return following

    monkeypatch.setattr(DecodeAhead, "submit_next", counted)
    blocks = random.Random(seed).choice([26, 60])
    options = {"max_batch": 6, "max_tokens": 50, "block_size": 4, "cache_bytes": blocks * 4 * slot_bytes(model.module)}
    works = []
    for ahead in (True, False):
        engine = engine_for(model, ahead=ahead, **options)
        engine.tells_later = later
        works.append(Work(engine, seed))
        manager = engine.batch.scheduler.manager
        assert manager.free == manager.blocks == blocks and not any(manager.references) and not engine.running
    assert sum(followed) > 2  # of the first engine
    ours, right = works
    for number, (found, expected) in enumerate(zip(ours.requests, right.requests, strict=True)):
        cut = number in ours.cancelled | right.cancelled
        for mine, theirs in zip(found.result.choices, expected.result.choices, strict=True):
            if cut:  # by when it was told
                length = min(len(mine.token_ids), len(theirs.token_ids))
                assert mine.token_ids[:length] == theirs.token_ids[:length]
            else:
                assert (mine.text, mine.token_ids, mine.finish_reason) == (
                    theirs.text,
                    theirs.token_ids,
                    theirs.finish_reason,
                )
                assert _logprobs(mine.logprobs) == pytest.approx(_logprobs(theirs.logprobs), abs=1e-4)
        if not cut:
            each = [[(d.text, d.token_ids, d.finish_reason) for d in w.deltas[number] if d.choice == 0] for w in works]
            assert each[0] == each[1]


def _logprobs(entries) -> list[float]:
    return [entry.logprob for entry in entries or ()]


def test_the_next_forward_is_submitted_before_the_tokens_are_known(model):
    """And reads the very tokens; nothing is submitted behind the last one that a sequence may have."""
    engine, seen = engine_for(model, ahead=True), []
    run = engine.batch.runner.run

    def watched(chunks, inspect=None, tokens_N=None):
        seen.append((tokens_N, [chunk.state.tokens[-1] for chunk in chunks]))
        return run(chunks, inspect, tokens_N)

    engine.batch.runner.run = watched
    request = engine.request("ab", Sampling(max_tokens=5, temperature=0, ignore_eos=True))
    engine.submit(request)
    known = []
    while engine.step():
        known.append(len(request.result.choices[0].token_ids))
    ids = request.result.choices[0].token_ids
    assert len(ids) == 5 and len(seen) == 5  # the prompt, and four tokens
    assert [tokens is not None for tokens, _ in seen] == [False, False, True, True, True]
    assert [tokens.tolist() for tokens, _ in seen[2:]] == [[token] for token in ids[1:4]]
    assert all(last == [-1] for _, last in seen[2:]) and known == [1, 2, 3, 4]


def test_a_sequence_that_has_ended_discards_its_token_and_frees_its_blocks(model):
    """The end token is known only once the next forward has been submitted."""
    alone = Engine(model).generate("ab", Sampling(max_tokens=6, temperature=0, ignore_eos=True))[0].token_ids
    end = alone[3]
    engine = engine_for(model, ahead=True)
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True, stop_token_ids=(end,))
    request = engine.request("ab", sampling)
    engine.submit(request)
    while engine.step():
        pass
    assert request.result.choices[0].token_ids == alone[: alone.index(end) + 1]
    assert request.result.choices[0].finish_reason == "stop"
    flight, manager = engine.batch._flight, engine.batch.scheduler.manager
    assert flight is not None and manager.free == manager.blocks
    assert engine.generate("ab", Sampling(max_tokens=6, temperature=0, ignore_eos=True))[0].token_ids == alone


def test_logits_that_are_not_finite_end_one_request(model):
    engine, calls = engine_for(model, ahead=True), []
    run = engine.batch.runner.run

    def broken(chunks, inspect=None, tokens_N=None):
        logits = run(chunks, inspect, tokens_N)
        calls.append(1)
        if len(calls) == 4:
            logits[0] = torch.nan
        return logits

    engine.batch.runner.run = broken
    sampling = Sampling(max_tokens=9, temperature=0, ignore_eos=True)
    first, second = engine.request("ab", sampling), engine.request("cd", sampling)
    for request in (first, second):
        engine.submit(request)
    while engine.step():
        pass
    assert "NaN or infinite" in str(first.error) and second.error is None
    assert second.result.choices[0].token_ids == Engine(model).generate("cd", sampling)[0].token_ids


def test_a_forward_that_fails_is_read_again_once_its_tokens_are_known(model):
    engine, calls = engine_for(model, ahead=True), []
    run = engine.batch.runner.run

    def broken(chunks, inspect=None, tokens_N=None):
        calls.append(tokens_N)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return run(chunks, inspect, tokens_N)

    engine.batch.runner.run = broken
    sampling = Sampling(max_tokens=9, temperature=0, ignore_eos=True)
    prompts = ["ab", "cd"]
    found = [answer.token_ids for answer in engine.generate(prompts, sampling)]
    assert calls[3] is not None and calls[4] is None
    assert found == [answer.token_ids for answer in Engine(model).generate(prompts, sampling)]


def test_a_recorded_forward_reads_tokens_that_lie_on_the_device(model):
    """In the place of the chunks' own, whatever these are."""
    rng, module = random.Random(random.randrange(2**32)), model.module
    cache = PagedCache.of(module, blocks=20, block_size=4)
    graphs, runner = DecodeGraphs(module, cache, 8), ModelRunner(module, cache)
    tokens = [[rng.randrange(97) for _ in range(rng.randrange(2, 12))] for _ in range(3)]
    states = [SequenceState(each, (i,), table=[3 * i, 3 * i + 1, 3 * i + 2]) for i, each in enumerate(tokens)]
    runner.run([Chunk(state, 0, len(state.tokens) - 1) for state in states])
    held = cache.layers[0].keys[: 9 * 4].view(torch.int32).clone()  # bits, since slots without a token may hold NaN
    graphs.start()  # over padding alone
    assert torch.equal(cache.layers[0].keys[: 9 * 4].view(torch.int32), held)
    last = [Chunk(state, len(state.tokens) - 1, 1) for state in states]
    known = runner.run(last).clone()
    given = torch.tensor([state.tokens[-1] for state in states])
    for state in states:
        state.tokens[-1] = -1
    with torch.inference_mode():
        torch.testing.assert_close(graphs.run(last, given), known, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runner.run(last, tokens_N=given), known, atol=1e-5, rtol=1e-5)

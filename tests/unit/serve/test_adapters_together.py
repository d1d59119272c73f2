"""Adapters in stacks: each row of a batch gets what the model with its adapter alone computes, whatever else happens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from adapted_models import GREEDY, SPEC, alone, prompts, write_adapted
from interpreter import HERE, here, run_interpreted

from luban import Engine, Sampling, build_model, load_model
from luban.adapters.dora import DoRA
from luban.adapters.lora import LoRA
from luban.adapters.pissa import PiSSA
from luban.core.errors import UnsupportedError
from luban.generate.paged_cache import PagedCache
from luban.load.model import LoadedModel
from luban.nn.linear import matmul_owners
from luban.serve.decode_ahead import DecodeAhead
from luban.serve.memory import slot_bytes
from luban.serve.model_runner import ModelRunner
from luban.serve.paged import PagedBatch
from luban.serve.pool import recorded_forwards
from luban.serve.scheduler import Chunk, SequenceState

KINDS = {
    "a": LoRA(rank=3),
    "b": LoRA(rank=2, targets=("q", "down")),
    "p": PiSSA(rank=10, targets=("q", "o", "up")),  # exported with twice the rank, more than the stacks hold at first
    "c": DoRA(rank=2),
}
NAMES = ["", *KINDS]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A model and adapters for it."""
    return write_adapted(tmp_path_factory.mktemp("together"), KINDS)


def paged(engine: Engine) -> PagedBatch:
    assert isinstance(engine.batch, PagedBatch)
    return engine.batch


@pytest.mark.parametrize("names", [["a", "", "b", "p", "a"], ["c", "a", "", "p", "c"]], ids=["stacks", "with a loop"])
def test_logits_of_every_row(names, served):
    """Prompts of many tokens and single tokens in one forward, float32: as near to float64 as the adapted model alone is, up to
    a factor, since random weights may magnify the rounding of float32."""
    base, made = served
    rng = random.SystemRandom()
    engine = Engine(load_model(base), adapters=made)
    texts = [[rng.randrange(20, 270) for _ in range(rng.choice([1, 2, 30]))] for _ in names]
    states = [SequenceState(text, (i, 0), "", name) for i, (name, text) in enumerate(zip(names, texts, strict=True))]
    for i, state in enumerate(states):
        state.table = [2 * i, 2 * i + 1]
    found = paged(engine).runner.run([Chunk(state, 0, len(state.tokens)) for state in states])
    for name, text, logits in zip(names, texts, found, strict=True):
        with torch.no_grad():
            module = load_model(base, adapter=made.get(name)).module
            single = module(torch.tensor([text]))[0, -1]
            wanted = module.double()(torch.tensor([text]))[0, -1]
        off = float((single - wanted).abs().max())
        torch.testing.assert_close(logits.double(), wanted, rtol=0, atol=8 * off + 1e-5 * float(wanted.abs().max()))


def test_adapters_come_and_go_while_requests_run(served):
    """More adapters than memory holds, asked for at random times; little memory for keys and values, so that sequences are
    preempted and read again."""
    base, made = served
    rng = random.SystemRandom()
    engine = Engine(load_model(base), adapters=made, max_adapters=2, max_batch=5, cache_bytes=9 * 16 * 4 * 2 * 2 * 16)
    texts = prompts(14)
    names = [rng.choice(NAMES) for _ in texts]
    requests = [engine.request(text, GREEDY) for text in texts]
    held = set()
    for request, name in zip(requests, names, strict=True):
        engine.use_adapter(request, name)
        engine.submit(request)
        for _ in range(rng.randrange(4)):
            engine.step()
            assert engine.adapters is not None and len(engine.adapters.held) <= 2
            held |= {tuple(engine.adapters.held)}
    while engine.step():
        pass
    wanted = [alone(base, made.get(name), text) for name, text in zip(names, texts, strict=True)]
    assert [request.result.choices[0].token_ids for request in requests] == wanted


def test_nothing_of_an_adapter_stays(served):
    base, made = served
    engine, (text,) = Engine(load_model(base), adapters=made), prompts(1)
    assert engine.adapters is not None and engine.adapters.held == list(made)
    plain = alone(base, None, text)
    for name in made:
        engine.adapters.drop(name)
    stacks = {id(s): s for _, owner in matmul_owners(engine.model.module) for s in owner.stacks.values()}
    assert len(stacks) == 2 * 4  # a layer has q, k and v; o; gate and up; down
    assert not any(factors.any() for s in stacks.values() for factors in (s.a_SRI, s.b_SOR, s.scales_SP))
    assert engine.generate(text, GREEDY)[0].token_ids == plain


@pytest.mark.parametrize("guessed", ["ngram", "draft"])
def test_guessed_tokens(guessed, served):
    base, made = served
    draft = LoadedModel(
        spec=SPEC, module=build_model(SPEC, seed=3), tokenizer=None, name="d", path=Path(), manifest=None
    )
    settings = {"ngram": True} if guessed == "ngram" else {"draft": draft}
    engine = Engine(load_model(base), adapters=made, draft_tokens=3, **settings)
    sampling = Sampling(max_tokens=14, temperature=0, ignore_eos=True)
    for _ in range(8):  # until an answer has a token that stood in its text, after which something can be guessed
        texts = [text * 2 for text in prompts(len(NAMES))]
        found = engine.generate(texts, sampling, adapters=NAMES)
        for name, text, result in zip(NAMES, texts, found, strict=True):
            wanted = Engine(load_model(base, adapter=made.get(name))).generate(text, sampling)
            assert result.token_ids == wanted[0].token_ids, name
        if engine.load().drafted:
            return
    raise AssertionError("nothing was guessed")


def test_the_same_bits_in_any_batch(served):
    base, made = served
    rng = random.SystemRandom()
    texts = prompts(12)
    names = [rng.choice(["", "a", "b", "p"]) for _ in texts]
    sampling = Sampling(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)

    def engine() -> Engine:
        stacked = {name: made[name] for name in ("a", "b", "p")}
        return Engine(load_model(base), adapters=stacked, batch_invariant=True)

    together = engine().generate(texts, sampling, adapters=names)
    one = engine()
    for name, text, result in zip(names, texts, together, strict=True):
        single = one.generate(text, sampling, adapters=name)[0]
        assert [e.logprob for e in single.choices[0].logprobs] == [e.logprob for e in result.choices[0].logprobs]
        assert single.token_ids == result.token_ids == alone(base, made.get(name), text)[:6]
    with pytest.raises(UnsupportedError, match="of kind dora, whose outputs depend in their last bits"):
        Engine(load_model(base), adapters=made, batch_invariant=True)


def test_over_weights_in_8_bits(served):
    base, made = served
    known = {name: made[name] for name in ("a", "b")}
    engine, texts = Engine(load_model(base, dtype="int8"), adapters=known), prompts(2)
    wanted = [Engine(load_model(base, dtype="int8", adapter=made[name])) for name in ("a", "b")]
    for name, text, other in zip(("a", "b"), texts, wanted, strict=True):
        assert engine.generate(text, GREEDY, adapters=name)[0].token_ids == other.generate(text, GREEDY)[0].token_ids


def test_recorded_forwards_go_where_their_work_changes(served):
    """b changes q and down alone, so forwards recorded before a has been there lack the kernels of other projections; p has a
    larger rank. Where adapters come again nothing changes."""
    base, made = served
    engine = Engine(load_model(base), adapters={name: made[name] for name in ("b", "a", "p")}, max_adapters=1)
    pool = engine.adapters
    assert pool is not None
    graphs, _ = recorded_forwards(engine.model.module, paged(engine).runner.cache, 4, 64, pool)
    stored: dict = {(size, adapted): (None, None) for size in (1, 2) for adapted in (False, True)}

    def left() -> set[tuple[int, bool]]:
        graphs._wanted(1)
        return set(graphs._graphs)

    left()
    for name, kept in (("b", True), ("a", False), ("b", True), ("a", True), ("p", False), ("b", True), ("p", True)):
        graphs._graphs = dict(stored)
        pool.hold(name, ())
        assert left() == {key for key in stored if kept or not key[1]}, name


@pytest.mark.skipif(HERE, reason="the test below runs here")
def test_under_the_interpreter():
    run_interpreted(__file__, "-k", "recorded")


@here
def test_forwards_as_they_are_recorded(served):
    """With the kernels and in padded forwards over fixed memory, on the host: adapters, none, one that is in no stack, and an
    eviction between."""
    base, made = served
    engine = Engine(load_model(base), adapters=made, max_adapters=2, max_batch=4, cache_bytes=1 << 20)
    batch, module = paged(engine), engine.model.module
    blocks = (1 << 20) // (slot_bytes(module) * 16)
    cache = PagedCache.of(module, blocks=blocks + 1, block_size=16)
    graphs, prompt_graphs = recorded_forwards(module, cache, 4, 64, engine.adapters)
    assert prompt_graphs is not None
    prompt_graphs.kernel = "luban"  # torch's attention needs to know the chunks' lengths
    prompt_graphs.needed = 1  # type: ignore[misc]
    batch.runner = ModelRunner(module, cache, graphs=graphs, adapters=engine.adapters, prompts=prompt_graphs)
    texts, sampling = [text[12:] for text in prompts(2)], Sampling(max_tokens=3, temperature=0, ignore_eos=True)
    plain = {name: Engine(load_model(base, adapter=made.get(name))) for name in ("", "a", "b", "p")}
    for names in (["a", "b"], ["", ""], ["p", ""]):
        found = engine.generate(texts, sampling, adapters=names)
        wanted = [plain[name].generate(text, sampling)[0] for name, text in zip(names, texts, strict=True)]
        assert [result.token_ids for result in found] == [result.token_ids for result in wanted], names
    assert {key[1] for key in graphs._asked} == {False, True}
    assert {key[1] for key in prompt_graphs._asked} == {False, True}


def test_requests_with_adapters_go_ahead_of_the_host(served, monkeypatch):
    """Forwards are submitted before the last one's tokens are known, and each request still gets its own adapter's tokens,
    though others leave, come, and push adapters out of memory meanwhile."""
    base, made = served
    rng, followed = random.SystemRandom(), []
    follow = DecodeAhead.submit_next

    def counted(self, flight, scheduler, runner):
        following = follow(self, flight, scheduler, runner)
        followed.append(following is not None)
        return following

    monkeypatch.setattr(DecodeAhead, "submit_next", counted)
    engine = Engine(load_model(base), adapters=made, max_adapters=2, max_batch=5)
    paged(engine).runs_ahead = True
    plain = {name: Engine(load_model(base, adapter=made.get(name))) for name in NAMES}
    texts = prompts(14)
    names = [rng.choice(NAMES) for _ in texts]
    lengths = [rng.choice([1, 4, 12]) for _ in texts]
    waiting = list(zip(texts, names, lengths, strict=True))
    requests = []
    while waiting or not all(request.done for request in requests):
        if waiting and rng.random() < 0.5:
            text, name, length = waiting.pop()
            request = engine.request(text, Sampling(max_tokens=length, temperature=0, ignore_eos=True))
            engine.use_adapter(request, name)
            engine.submit(request)
            requests.append(request)
        engine.step()
    assert sum(followed) > 5
    for request, text, name, length in zip(requests, texts[::-1], names[::-1], lengths[::-1], strict=True):
        sampling = Sampling(max_tokens=length, temperature=0, ignore_eos=True)
        assert request.result.token_ids == plain[name].generate([text], sampling)[0].token_ids, name

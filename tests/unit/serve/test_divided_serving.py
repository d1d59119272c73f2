"""A model over several processes against the same model in one: the same tokens, whatever is preempted, shared or guessed."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
import warm

import luban
from luban import Sampling, Structure
from luban.core.errors import ConfigError, UnsupportedError, UsageError
from luban.core.plan import ParallelPlan
from luban.load.model import LoadedModel
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.init import NormalInit
from luban.nn.int8 import pack_for_inference
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import Strided
from luban.nn.mixer.lsh import LSH
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.top_k import TopK
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.kerple import KerpleLog
from luban.nn.position.learned import Learned
from luban.nn.position.t5 import RelativeBias
from luban.serve.batch import LostProcess
from luban.serve.memory import slot_bytes
from luban.serve.paged import PagedBatch
from luban.serve.request import Request
from luban.serve.scheduler import Chunk, SequenceState
from luban.serve.tensor import leader as leading
from luban.serve.tensor.follower import follow
from luban.serve.tensor.told import ChunkReader, ChunkWriter

VOCABULARY = 37  # which 2 doesn't divide


def spec(**fields) -> ModelSpec:
    plain = {"mixer": Grouped(heads=4, kv_heads=2), "feedforward": SwiGLU(width=41), "layers": 2}
    return uniform(
        **{"vocab_size": VOCABULARY, "width": 32, "context": 90, "init": NormalInit(std=0.2), **plain, **fields}
    )


FAMILIES = {
    "grouped": spec(),
    "one key head, biases": spec(mixer=Grouped(heads=4, kv_heads=1, qkv_bias=True, output_bias=True)),
    "three heads of one": spec(mixer=Grouped(heads=3, kv_heads=1, head_dim=10), position=KerpleLog()),
    "alibi, window, norms of heads": spec(position=Alibi(), mixer=Grouped(heads=4, window=9, qk_norm=RMSNorm())),
    "learned": spec(position=Learned(), norm=LayerNorm(), feedforward=GELU(width=41), tied_head=True),
    "t5": spec(position=RelativeBias(), vocab_size=40),
}


def loaded(made: ModelSpec, seed: int = 0) -> LoadedModel:
    module = luban.build_model(made, seed=seed)
    return LoadedModel(spec=made, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


def started(*arguments):
    """As `start_process`, without importing everything anew."""
    process = warm._context.Process(target=follow, args=arguments)
    process.start()

    def end():
        process.kill()
        process.join()

    end.process = process
    return end


@pytest.fixture
def over(monkeypatch):
    """over(model, processes, options) → an engine; all are closed."""
    monkeypatch.setattr(leading, "start_process", started)
    with contextlib.ExitStack() as stack:

        def make(model: LoadedModel, processes: int = 2, **options) -> luban.Engine:
            engine = luban.Engine(model, plan=ParallelPlan(tensor=processes), **options)
            stack.callback(engine.close)
            return engine

        yield make


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Greedy ones with prompts that often begin alike, some with several answers or log-probabilities of the prompt."""
    beginnings = [[rng.randrange(VOCABULARY) for _ in range(50)] for _ in range(2)]
    made, logprobs = [], rng.choice([None, 0])
    for _ in range(count):
        prompt = rng.choice(beginnings)[: rng.randrange(50)] + [
            rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))
        ]
        settings = {
            "max_tokens": rng.choice([1, 6, 18]),
            "n": rng.choice([1, 1, 3]),
            "prompt_logprobs": rng.choice([None, 0]),
        }
        made.append(Request(prompt, Sampling(temperature=0, ignore_eos=True, logprobs=logprobs, **settings)))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_one_process(over, family):
    """In memory so small that sequences are preempted, with prompts found in the prefix cache."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, model = random.Random(seed), loaded(FAMILIES[family], seed % 1000)
    size, swap = rng.choice([4, 16]), rng.choice([0, 1 << 20])
    blocks = -(-90 // size) + 2
    guesses = {"ngram": True} if rng.random() < 0.3 else {}
    engine = over(model)
    held = blocks * size * engine.batch.budget.slot_bytes
    options = {"max_batch": 6, "max_tokens": 30, "block_size": size, "cache_bytes": held, "swap_bytes": swap, **guesses}
    engine.batch = PagedBatch(engine.model.module, leader=engine.batch.leader, **options)
    engine.batch.runs_ahead = rng.random() < 0.5
    alone, requests = luban.Engine(model, paged=False), random_requests(rng, 8)
    for request in requests:
        engine.submit(request)
        for _ in range(rng.randrange(4)):
            engine.step()
    while engine.step():
        pass
    assert engine.batch.scheduler.manager.free == engine.batch.scheduler.manager.blocks
    for request in requests:
        expected = alone.generate([request.prompt], replace(request.sampling, n=1))[0]
        for choice in request.result.choices:
            assert choice.token_ids == expected.token_ids
            ours, right = ([e.logprob for e in each.logprobs or ()] for each in (choice, expected))
            assert ours == pytest.approx(right, abs=1e-4)
        if request.sampling.prompt_logprobs is not None:
            found, right = ([e and e.logprob for e in r.prompt_logprobs] for r in (request.result, expected))
            assert found[1:] == pytest.approx(right[1:], abs=1e-4)


def test_more_processes_than_divide_the_heads_and_a_mixture_of_experts(over):
    """Five heads of one key head, channels of experts and a vocabulary over three processes."""
    experts = MixtureOfExperts(width=10, experts=4, router=TopK())
    model = loaded(spec(mixer=Grouped(heads=5, kv_heads=1, head_dim=6), feedforward=experts))
    engine, alone = over(model, 3), luban.Engine(model)
    rng = random.Random(random.randrange(2**32))
    prompts = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 40))] for _ in range(5)]
    sampling = Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True, logit_bias=((3, 1.0),))
    engine.batch.runs_ahead = True
    for each in (sampling, replace(sampling, logit_bias=()), replace(sampling, logit_bias=(), temperature=0)):
        found, expected = (engine.generate(prompts, each), alone.generate(prompts, each))
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert engine.batch.scheduler.manager.free == engine.batch.scheduler.manager.blocks


def test_a_draft_model_of_the_first_process_guesses(over):
    model, draft = loaded(spec()), loaded(spec(layers=1), seed=1)
    sampling = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6] * 9]
    engine, alone = over(model, draft=draft), luban.Engine(model)
    assert [a.token_ids for a in engine.generate(prompts, sampling)] == [
        a.token_ids for a in alone.generate(prompts, sampling)
    ]
    assert engine.batch.drafted > 0


def test_beams_and_structures(over, tiny_checkpoint):
    model = luban.load_model(tiny_checkpoint)
    engine, alone = over(model), luban.Engine(model)
    for sampling in (
        Sampling(max_tokens=8, beams=3, n=2, ignore_eos=True),
        Sampling(max_tokens=12, seed=3, structure=Structure.regex("[a-f]{2,9}[0-9]")),
    ):
        found, expected = (each.generate(["ab", "xyz"], sampling) for each in (engine, alone))
        assert [[c.token_ids for c in r.choices] for r in found] == [[c.token_ids for c in r.choices] for r in expected]


def test_the_smallest_memory_counts(over, monkeypatch):
    """Of three processes with four key heads the first has two, and so the fewest slots in as many bytes."""
    model = loaded(spec(mixer=Grouped(heads=4, kv_heads=4)))
    slot = slot_bytes(model.module)
    assert over(model, 3, cache_bytes=100 * 16 * slot // 2).batch.budget.slots == 100 * 16


@pytest.mark.parametrize("ahead", [False, True])
def test_a_process_that_is_killed_ends_the_engine(over, ahead):
    engine, seen = over(loaded(spec())), []
    engine.batch.runs_ahead = ahead
    engine.batch.watch(seen.append)
    sampling = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    engine.generate([[1, 2]], sampling)
    engine.submit(Request([1, 2, 3], sampling))
    for _ in range(3):
        engine.step()
    engine.batch.leader._ends[0].process.kill()
    with pytest.raises(LostProcess, match="process 1 of 2 of the model ended"):
        while engine.step():
            pass
    with pytest.raises(LostProcess, match="process 1 of 2"):
        engine.generate([[1]], sampling)
    assert [str(error) for error in seen] == ["process 1 of 2 of the model ended"]


@pytest.mark.parametrize("where", ["first", "other"])
def test_a_forward_that_fails_in_one_process_ends_the_engine_with_its_reason(over, where):
    """Nothing is read again one by one, as in one process: the others wouldn't know."""
    engine = over(loaded(spec()))
    if where == "first":
        engine.batch.runner.module.read = None  # not callable, behind the layers' messages
    else:
        engine.batch.leader.tell("pool", "nonsense")
    process, reason = ("0", "TypeError: 'NoneType'") if where == "first" else ("1", "AttributeError: 'str'")
    with pytest.raises(LostProcess, match=f"process {process} of 2 of the model failed: {reason}"):
        engine.generate([[1, 2], [3]], Sampling(max_tokens=9))


def test_what_cannot_be_divided_is_refused_by_name(monkeypatch):
    def refused(error, match, made: ModelSpec | None = None, processes: int = 2, plan=None, **options):
        monkeypatch.setattr(leading, "start_process", None)  # nothing is started
        with pytest.raises(error, match=match):
            luban.Engine(loaded(made or spec()), plan=plan or ParallelPlan(tensor=processes), **options)

    refused(ConfigError, "use at most --plan.tensor 4", processes=5)
    refused(UnsupportedError, "leave plan.pipeline out", plan=ParallelPlan(tensor=2, pipeline=2))
    refused(UnsupportedError, "encoder–decoders", spec(body=EncoderDecoderBody(decoder_start=1)))
    layout = Grouped(heads=4, layout=Strided(block=16, window=16, stride=2))
    refused(UnsupportedError, "block-sparse layouts", spec(mixer=layout))
    refused(UnsupportedError, "contiguous cache", paged=False)
    refused(UnsupportedError, "batch invariance", batch_invariant=True)
    refused(UnsupportedError, "can't be kept in blocks", spec(mixer=LSH(heads=4)))
    packed = loaded(spec(width=64, feedforward=SwiGLU(width=64)))
    pack_for_inference(packed.module)
    with pytest.raises(UnsupportedError, match="8 bits"):
        luban.Engine(packed, plan=ParallelPlan(tensor=2))


def test_an_engine_beside_another_with_a_plan_is_refused(over):
    model = loaded(spec())
    first = over(model)
    with pytest.raises(UsageError, match="another engine with a plan"):
        over(model)
    first.close()
    assert len(over(model).generate([[1, 2]], Sampling(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_what_is_told_of_forwards_is_what_they_are():
    """Tables that grow, change in place as copy-on-write does, or begin anew; sequences that come and go."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, writer, reader = random.Random(seed), ChunkWriter(), ChunkReader()
    states: list[SequenceState] = []
    for _ in range(200):
        match rng.randrange(4):
            case 0:
                states.append(SequenceState([rng.randrange(99) for _ in range(rng.randrange(2, 30))], (0,)))
            case 1 if states:
                del states[rng.randrange(len(states))]
        for state in states:
            match rng.randrange(4):
                case 0:
                    state.table = [rng.randrange(50) for _ in range(rng.randrange(1, 9))]
                case 1 if state.table:
                    state.table[rng.randrange(len(state.table))] = rng.randrange(50)
                case 2:
                    state.table.append(rng.randrange(50))
        chunks = []
        for state in rng.sample(states, rng.randrange(len(states) + 1)):
            start = rng.randrange(len(state.tokens))
            state.draft = [rng.randrange(99) for _ in range(rng.randrange(3))]
            whole = rng.random() < 0.5
            count = len(state.tokens) - start + len(state.draft) if whole else 1
            chunks.append(Chunk(state, start, count, len(state.draft) if whole else 0, rng.randrange(2)))
        for ours, told in zip(chunks, reader.read(writer.write(chunks)), strict=True):
            for name in ("start", "count", "drafts", "scored", "last", "wanted", "tokens"):
                assert (name == "drafts" and not ours.last) or getattr(told, name) == getattr(ours, name), name
            assert told.state.table == ours.state.table
    assert len(reader._states) <= len(states) + 3  # those that are gone are forgotten with the next message


def test_a_process_that_cannot_start_is_named(monkeypatch):
    def unusable(*arguments):
        *others, _, port = arguments
        return started(*others, "cuda:77", port)

    monkeypatch.setattr(leading, "start_process", unusable)
    with pytest.raises(LostProcess, match="process 1 of 2 of the model failed: "):
        luban.Engine(loaded(spec()), plan=ParallelPlan(tensor=2))
    monkeypatch.setattr(leading, "start_process", started)
    engine = luban.Engine(loaded(spec()), plan=ParallelPlan(tensor=2))
    engine.close()

"""Beam search: by brute force where the beam holds everything, by a slow reference where it doesn't, and transformers'."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

import luban
from luban import Sampling, Structure
from luban.core.errors import ConfigError
from luban.load.model import LoadedModel
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.serve.memory import RequestTooLarge
from luban.serve.paged import PagedBatch

VOCABULARY, END = 5, 4


def small_model(seed: int, vocabulary: int = VOCABULARY, ends=(END,)) -> LoadedModel:
    """A random decoder over a few tokens, without a tokenizer."""
    spec = uniform(
        vocab_size=vocabulary,
        width=16,
        layers=2,
        context=64,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=24),
        init=NormalInit(std=0.7),
    )
    module = luban.build_model(spec, seed=seed).eval()
    return LoadedModel(
        spec=spec, module=module, tokenizer=None, name="small", path=Path(), manifest=None, stop_ids=ends
    )


@torch.no_grad()
def logprobs(model: LoadedModel, tokens: list[int]) -> list[float]:
    return model.module(torch.tensor([tokens]))[0, -1].double().log_softmax(-1).tolist()


def every_answer(model, prompt, limit, penalty):
    """(score, tokens) of all answers, the best first."""
    found = []
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if END in tokens[:-1] or (tokens[-1] != END and length < limit):
                continue
            rows = model.module(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            total = rows.gather(1, torch.tensor(tokens)[:, None]).sum().item()
            found.append((total / length**penalty, list(tokens)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
def test_a_beam_that_holds_everything_finds_the_best_of_all(paged, penalty):
    seed = random.randrange(1000)
    model, prompt = small_model(seed), [1, 3]
    best = every_answer(model, prompt, 3, penalty)
    sampling = Sampling(beams=VOCABULARY**2, n=6, max_tokens=3, length_penalty=penalty)
    (result,) = luban.Engine(model, paged=paged).generate([prompt], sampling)
    assert [choice.token_ids for choice in result.choices] == [tokens for _, tokens in best[:6]], seed
    assert [choice.score for choice in result.choices] == pytest.approx([score for score, _ in best[:6]], abs=1e-4)
    for choice in result.choices:
        assert choice.finish_reason == ("stop" if choice.token_ids[-1] == END else "length")


def reference(model, prompt, beams, limit, penalty):
    """A plain beam search that reads every beginning anew."""
    live, done = [(0.0, [])], []
    for length in range(1, limit + 1):
        found = sorted(
            (
                (total + p, [*tokens, t])
                for total, tokens in live
                for t, p in enumerate(logprobs(model, prompt + tokens))
            ),
            key=lambda pair: -pair[0],
        )[: 2 * beams]
        ended = [pair for pair in found[:beams] if pair[1][-1] == END or length == limit]
        done += [(total / length**penalty, tokens) for total, tokens in ended]
        done = sorted(done, key=lambda pair: -pair[0])[:beams]
        live = [pair for pair in found if pair[1][-1] != END][:beams]
    return done


@pytest.mark.parametrize("paged", [True, False])
def test_several_searches_in_one_batch_are_those_of_the_reference(paged):
    seed = random.randrange(1000)
    rng, model = random.Random(seed), small_model(seed)
    engine, asked = luban.Engine(model, paged=paged), []
    for _ in range(5):
        prompt = [rng.randrange(VOCABULARY - 1) for _ in range(rng.randrange(1, 30))]
        beams, limit, penalty = rng.randrange(2, 5), rng.randrange(1, 12), rng.choice([0.0, 0.7, 1.0])
        sampling = Sampling(beams=beams, n=beams, max_tokens=limit, length_penalty=penalty)
        asked.append((engine.request(prompt, sampling), reference(model, prompt, beams, limit, penalty)))
        engine.submit(asked[-1][0])
        engine.submit(engine.request(prompt, Sampling(max_tokens=9, temperature=0)))  # samples share the batch
    while engine.step():
        pass
    for request, want in asked:
        assert [c.token_ids for c in request.result.choices] == [tokens for _, tokens in want], seed
        assert [c.score for c in request.result.choices] == pytest.approx([score for score, _ in want], abs=1e-4)
    if paged:
        manager = engine.batch.scheduler.manager
        assert manager.free == manager.blocks and not any(manager.references)


def test_searches_in_little_memory_are_preempted_and_lose_nothing():
    seed = random.randrange(1000)
    rng, model = random.Random(seed), small_model(seed)
    engine = luban.Engine(model)
    engine.batch = engine.intake.batch = PagedBatch(
        model.module, max_batch=16, max_tokens=40, block_size=4, cache_bytes=26 * 4 * 2 * 2 * 16 * 4
    )
    asked = []
    for priority in range(4):
        prompt = [rng.randrange(VOCABULARY - 1) for _ in range(12)]
        request = engine.intake.request(prompt, Sampling(beams=3, n=3, max_tokens=16), priority=-priority)
        asked.append((request, reference(model, prompt, 3, 16, 1.0)))
        engine.submit(request)
        engine.step()
    while engine.step():
        pass
    assert engine.batch.scheduler.preemptions > 0
    for request, want in asked:
        assert [c.token_ids for c in request.result.choices] == [tokens for _, tokens in want], seed
    manager = engine.batch.scheduler.manager
    assert manager.free == manager.blocks and not any(manager.references)


def test_beginnings_hold_their_common_blocks_together():
    model = small_model(3)
    engine = luban.Engine(model)
    engine.batch = engine.intake.batch = PagedBatch(model.module, block_size=4, max_batch=16)
    request = engine.request([1] * 41, Sampling(beams=4, n=1, max_tokens=10, min_tokens=10))
    engine.submit(request)
    for _ in range(4):
        engine.step()
    scheduler = engine.batch.scheduler
    assert len(scheduler.running) == 4
    held = {block for state in scheduler.running for block in state.table}
    assert len(held) <= 10 + 4 * 2 < sum(len(state.table) for state in scheduler.running)
    request.cancel()
    engine.step()
    assert scheduler.manager.free == scheduler.manager.blocks and not engine.running


def test_the_answers_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_model(random.randrange(1000), vocabulary=40, ends=(3,))
    luban.export_model(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    prompt = [5, 9, 20]
    for beams, penalty in ((3, 1.0), (4, 0.0)):
        with torch.no_grad():
            want = theirs.generate(
                torch.tensor([prompt]),
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=9,
                do_sample=False,
                length_penalty=penalty,
                early_stopping="never",
                eos_token_id=3,
                pad_token_id=3,
                output_scores=True,
                return_dict_in_generate=True,
            )
        sampling = Sampling(beams=beams, n=beams, max_tokens=9, length_penalty=penalty)
        (result,) = luban.Engine(model).generate([prompt], sampling)
        rows = [row[3:].tolist() for row in want.sequences]
        rows = [row[: row.index(3) + 1] if 3 in row else row for row in rows]
        assert [c.token_ids for c in result.choices] == rows
        assert [c.score for c in result.choices] == pytest.approx(want.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("fixture", ["tiny_checkpoint", "tiny_translator"])
def test_text_of_the_answers_and_of_an_encoder_decoder(request, fixture):
    model = luban.load_model(request.getfixturevalue(fixture))
    engine = luban.Engine(model)
    sampling = Sampling(beams=3, n=2, max_tokens=8)
    (result,) = engine.generate("hé", sampling)
    first, second = result.choices
    assert first.score >= second.score and first.token_ids != second.token_ids
    deltas = list(engine.stream("hé", sampling))
    assert [d.text for d in deltas] == [first.text, second.text] and [d.choice for d in deltas] == [0, 1]
    (greedy,) = engine.generate("hé", Sampling(max_tokens=8, temperature=0, logprobs=0))
    total = sum(entry.logprob for entry in greedy.logprobs)
    assert first.score >= total / len(greedy.token_ids) - 1e-5


def test_a_structure_holds_in_every_beginning(tiny_checkpoint):
    pytest.importorskip("llguidance")
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    sampling = Sampling(beams=3, n=3, max_tokens=12, structure=Structure.choice(["abc", "abd", "xy"]))
    (result,) = engine.generate("q", sampling)
    assert sorted(choice.text for choice in result.choices) == ["abc", "abd", "xy"]


def test_what_cannot_be_is_refused(tiny_checkpoint):
    for fields in ({"beams": 0}, {"beams": 2, "n": 3}, {"beams": 2, "logprobs": 1}, {"beams": 2, "stop": "a"}):
        with pytest.raises(ConfigError):
            Sampling(**fields)
    engine = luban.Engine(luban.load_model(tiny_checkpoint), cache_bytes=96 * 256)
    engine.generate("a", Sampling(beams=2, max_tokens=20))
    with pytest.raises(RequestTooLarge, match=r"5 × \d+ tokens"):
        engine.generate("a", Sampling(beams=5, max_tokens=30))

"""Speculative decoding: the same tokens as without, whatever is guessed; the same distribution by counting."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import luban
from luban import Sampling, Structure
from luban.core.errors import UnsupportedError
from luban.serve.paged import PagedBatch
from luban.serve.scheduler import SequenceState
from luban.serve.speculation import LONGEST, SHORTEST, NgramProposer


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def draft(model):
    """A model that agrees with the model often, but not always: its weights with noise."""
    module = luban.build_model(model.spec, seed=0).eval()
    module.load_state_dict(model.module.state_dict())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.03 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return replace(model, module=module)


SETTINGS = [
    Sampling(max_tokens=24, temperature=0, ignore_eos=True),
    Sampling(max_tokens=17, seed=3, ignore_eos=True, logprobs=2, n=2),
    Sampling(max_tokens=16, seed=4, temperature=0.7, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3),
    Sampling(max_tokens=14, seed=5, top_k=4, stop=("e", "\n"), min_tokens=4),
    Sampling(max_tokens=12, temperature=0, logit_bias={70: 100}),  # repeats a token
    Sampling(max_tokens=1, temperature=0),
    Sampling(max_tokens=2, temperature=0, logprobs=0),
]


def run(engine, prompts, settings=SETTINGS):
    requests = [engine.request(prompt, sampling) for prompt in prompts for sampling in settings]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    assert not any(request.error for request in requests)
    manager = engine.batch.scheduler.manager
    assert manager.free == manager.blocks and not any(manager.references)
    return [choice for request in requests for choice in request.result.choices]


@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_every_token_is_the_one_without_speculation(model, draft, kind):
    rng = random.Random()
    prompts = ["abcabcabcab", [rng.randrange(16, 272) for _ in range(37)]]
    plain = run(luban.Engine(model), prompts)
    engine = luban.Engine(model, **({"draft": draft} if kind == "draft" else {"ngram": True}), draft_tokens=5)
    found = run(engine, prompts)
    for got, want in zip(found, plain, strict=True):
        assert got.token_ids == want.token_ids and got.text == want.text and got.finish_reason == want.finish_reason
        assert [e.token for e in got.logprobs or []] == [e.token for e in want.logprobs or []]
        for mine, other in zip(got.logprobs or [], want.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert mine.sampling_logprob == pytest.approx(other.sampling_logprob, abs=1e-3)
    load = engine.load()
    assert load.drafted >= load.accepted > (load.drafted * 0.1 if kind == "draft" else 0)


def test_a_perfect_draft_is_always_right(model):
    engine = luban.Engine(model, draft=model, draft_tokens=4)
    (result,) = engine.generate("hi", Sampling(max_tokens=41, temperature=0, ignore_eos=True))
    load = engine.load()
    assert len(result.token_ids) == 41 and load.accepted == load.drafted == 32  # 1 with the prompt, then 5 a forward


@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_preempted_sequences_and_structures_lose_nothing(model, draft, kind):
    pytest.importorskip("llguidance")
    settings = [
        Sampling(max_tokens=20, seed=1, ignore_eos=True),
        Sampling(max_tokens=40, seed=2, structure=Structure.regex("(ab|cd){4,9}!")),
        Sampling(max_tokens=20, seed=7, prompt_logprobs=1),
        Sampling(max_tokens=9, beams=3, n=2),
    ]
    prompts = ["xyxyxyxy", "ab" * 9]
    plain = run(luban.Engine(model), prompts, settings)
    engine = luban.Engine(model)
    size = 2 * 2 * 2 * 8 * 4 * (2 if kind == "draft" else 1)
    engine.batch = engine.intake.batch = PagedBatch(
        model.module,
        max_batch=8,
        max_tokens=24,
        block_size=4,
        cache_bytes=34 * 4 * size,
        draft=draft.module if kind == "draft" else None,
        ngram=kind == "ngram",
    )
    found = run(engine, prompts, settings)
    assert [choice.token_ids for choice in found] == [choice.token_ids for choice in plain]
    assert engine.batch.scheduler.preemptions > 0
    for choice in found:
        if choice.finish_reason == "stop" and choice.text.endswith("!"):
            assert re.fullmatch("(ab|cd){4,9}!", choice.text)


def test_the_distribution_is_the_models(model, draft):
    """χ² over the first three tokens of many seeds, among the few that top-k leaves; 5 standard deviations."""
    engine, draws = luban.Engine(model, draft=draft, draft_tokens=2), 400
    sampling = Sampling(max_tokens=3, top_k=2, ignore_eos=True, temperature=1.0)
    prompt = [0, 70, 80]
    requests = [engine.request(prompt, replace(sampling, seed=seed)) for seed in range(draws)]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    counts = Counter(tuple(request.result.token_ids) for request in requests)

    def following(tokens):
        with torch.no_grad():
            top = model.module(torch.tensor([tokens]))[0, -1].double().topk(2)
        return dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))

    expected = {
        (a, b, c): draws * p * q * r
        for a, p in following(prompt).items()
        for b, q in following([*prompt, a]).items()
        for c, r in following([*prompt, a, b]).items()
    }
    assert set(counts) <= set(expected) and engine.load().accepted > 50
    chi2 = sum((counts[tokens] - want) ** 2 / want for tokens, want in expected.items())
    degrees = len(expected) - 1
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_n_grams_are_those_of_a_search_from_the_end():
    proposer, rng = NgramProposer(), random.Random()
    state = SequenceState([rng.randrange(3) for _ in range(5)], (0,))
    for _ in range(60):
        most = rng.randrange(1, 6)
        proposer.propose([(state, None, most)])
        want: list[int] = []
        tokens = state.tokens
        for size in range(LONGEST, SHORTEST - 1, -1):
            ends = [
                i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:] and len(tokens) > size
            ]
            if ends:
                want = tokens[ends[-1] : ends[-1] + most]
                break
        assert state.draft == want
        state.tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
    proposer.forget(state)
    assert not proposer._ends and not proposer._read


def test_what_cannot_guess_is_refused(model, draft, tiny_translator):
    other = replace(
        model,
        module=luban.build_model(replace(model.spec, vocab_size=300)),
        spec=replace(model.spec, vocab_size=300),
        tokenizer=None,
    )
    for make, words in (
        (lambda: luban.Engine(model, draft=other), "must have the same"),
        (lambda: luban.Engine(model, draft=draft, ngram=True), "use one"),
        (lambda: luban.Engine(model, draft=draft, paged=False), "in blocks"),
        (
            lambda: luban.Engine(model, draft=replace(luban.load_model(tiny_translator), tokenizer=None)),
            "encoder–decoder",
        ),
    ):
        with pytest.raises(UnsupportedError, match=words):
            make()

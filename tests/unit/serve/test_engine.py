"""The engine: independence of the batch, ends, stops, log-probabilities, streams, refusals."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest
import torch
from llama_vocabulary import llama_vocabulary

import luban
from luban import Sampling
from luban.core.errors import DataError
from luban.generate.cache import ContextError
from luban.serve.engine import Request
from luban.tokenizer.settings import Settings
from luban.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(params=[True, False], ids=["paged", "contiguous"])
def paged(request):
    return request.param


@pytest.fixture
def engine(model, paged):
    return luban.Engine(model, paged=paged)


PROMPTS = ["a", "hello there", "中文", "x" * 40]


def test_a_request_does_not_depend_on_its_batch(model, engine, paged):
    sampling = Sampling(max_tokens=12, seed=11, n=2, temperature=0.9, top_p=0.95, ignore_eos=True)
    together = engine.generate(PROMPTS, sampling)
    small = luban.Engine(model, max_batch=3, paged=paged)  # others wait, join and leave
    queued = small.generate(PROMPTS, sampling)
    for number, (prompt, a, b) in enumerate(zip(PROMPTS, together, queued, strict=True)):
        alone = engine.generate(prompt, sampling.for_prompt(number))[0]
        assert [c.token_ids for c in a.choices] == [c.token_ids for c in alone.choices]
        assert [c.token_ids for c in b.choices] == [c.token_ids for c in alone.choices]
        assert a.choices[0].token_ids != a.choices[1].token_ids


def test_seeds_repeat_and_differ(engine):
    def run(seed):
        return engine.generate("seed", Sampling(max_tokens=16, seed=seed, ignore_eos=True))[0].token_ids

    assert run(1) == run(1) != run(2)
    assert run(None) != run(None)


def test_every_prompt_of_a_call_has_draws_of_its_own(engine):
    """Equal prompts get answers that are unlike each other, the same ones again under the same seed; the first is as if alone."""
    sampling = Sampling(max_tokens=16, seed=secrets.randbits(40), n=2, ignore_eos=True)
    found = [[c.token_ids for c in r.choices] for r in engine.generate(["again"] * 6, sampling)]
    assert len({tuple(tokens) for each in found for tokens in each}) == 12
    assert [[c.token_ids for c in r.choices] for r in engine.generate(["again"] * 6, sampling)] == found
    assert [c.token_ids for c in engine.generate("again", sampling)[0].choices] == found[0]
    fewer = engine.generate(["again"] * 3, sampling)
    assert [[c.token_ids for c in r.choices] for r in fewer] == found[:3]


def test_sequences_of_different_length_leave_and_join(model, paged):
    engine = luban.Engine(model, max_batch=2, paged=paged)
    requests = [
        Request(engine.tokens_of("q" * (i + 1)), Sampling(max_tokens=i + 1, temperature=0, ignore_eos=True))
        for i in (5, 0, 2, 9, 1)
    ]
    for request in requests:
        engine.submit(request)
    while engine.step():
        assert len(engine.batch.sequences) <= 2
    for request in requests:
        alone = luban.Engine(model).generate([request.prompt], request.sampling)[0]
        assert request.result.token_ids == alone.token_ids
        assert len(request.result.token_ids) == request.sampling.max_tokens
    assert not engine.running and not engine.batch.sequences


def test_an_end_token_stops_and_is_no_text(engine, model):
    row = model.module.head.weight
    saved = row.clone()
    with torch.no_grad():
        row[model.tokenizer.special["<|end|>"]] = 50 * row.mean(0) + 50
        try:
            results = [engine.generate("abc", Sampling(max_tokens=20, seed=s, temperature=1.5))[0] for s in range(30)]
            ignoring = engine.generate("abc", Sampling(max_tokens=20, seed=0, temperature=1.5, ignore_eos=True))[0]
        finally:
            row.copy_(saved)
    ended = [r for r in results if r.finish_reason == "stop"]
    assert ended
    for result in ended:
        assert result.token_ids[-1] in model.stop_ids
        assert not set(result.token_ids[:-1]) & set(model.stop_ids)
        assert result.text == model.tokenizer.decode(result.token_ids)
    assert len(ignoring.token_ids) == 20 and ignoring.finish_reason == "length"


def test_stop_strings(engine):
    whole = engine.generate("abc", Sampling(max_tokens=40, seed=5, ignore_eos=True))[0]
    stop = whole.text[10:13]
    cut = engine.generate("abc", Sampling(max_tokens=40, seed=5, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.finish_reason == "stop" and whole.finish_reason == "length"


def test_log_probabilities_are_the_models_own(engine, model):
    """Not those after temperature and filters: what a trainer would compute from the same tokens."""
    sampling = Sampling(max_tokens=8, seed=2, temperature=0.3, top_k=5, logprobs=3, ignore_eos=True)
    result = engine.generate("logprobs", sampling)[0]
    tokens = torch.tensor([result.prompt_token_ids + result.token_ids])
    expected = model.module(tokens)[0].log_softmax(-1)[len(result.prompt_token_ids) - 1 : -1]
    for entry, row, token in zip(result.logprobs, expected, result.token_ids, strict=True):
        assert entry.token == token
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()
    assert engine.generate("x", Sampling(max_tokens=1))[0].logprobs is None


def llama_like():
    """Chats in a vocabulary with a space before every text and bytes for rare characters."""
    return Tokenizer(llama_vocabulary(), Settings(bos_token="<s>", chat_template="{{ messages[0].content }}"))


def test_a_continuation_keeps_its_space_and_an_answer_has_none(model, monkeypatch, paged):
    """`x` goes on with ` x漢🐉`, where the space belongs to the token; as an answer to a message the same is a text."""
    tokenizer = llama_like()
    engine = luban.Engine(replace(model, tokenizer=tokenizer, stop_ids=()), paged=paged)
    written = [261, *(3 + byte for byte in "漢🐉".encode()), 260]

    def choose(logits, sequences, seen):
        for sequence in sequences:
            sequence.tokens.append(written[len(sequence.tokens)])
        return [sequence.tokens[-1] for sequence in sequences]

    monkeypatch.setattr(f"luban.{'serve.speculation' if paged else 'generate.session'}.choose", choose)
    sampling = Sampling(max_tokens=len(written))
    pieces = {}
    for name, prompt in (("text", "x"), ("ids", [1, 261]), ("messages", [{"role": "user", "content": "x"}])):
        pieces[name] = [delta.text for delta in engine.stream(prompt, sampling)]
    assert pieces["text"] == pieces["ids"] == [" x", "", "", "漢", "", "", "", "🐉", "x"]
    assert pieces["messages"] == ["x", "", "", "漢", "", "", "", "🐉", "x"]


def test_streamed_pieces_join_to_the_result(engine):
    sampling = Sampling(max_tokens=30, seed=3, ignore_eos=True, n=2, stop=("zz",))
    deltas = list(engine.stream("stream", sampling))
    result = engine.generate("stream", sampling)[0]
    for index, choice in enumerate(result.choices):
        mine = [d for d in deltas if d.choice == index]
        assert "".join(d.text for d in mine) == choice.text
        assert [token for d in mine for token in d.token_ids] == choice.token_ids
        assert [d.finish_reason for d in mine][-1] == choice.finish_reason
        assert not any(d.finish_reason for d in mine[:-1])


def test_a_closed_stream_leaves_nothing_running(engine):
    stream = engine.stream("stop early", Sampling(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    assert not engine.running and not engine.batch.sequences


def test_generation_ends_at_the_context(engine, model):
    prompt = [40] * (model.spec.context - 3)
    result = engine.generate([prompt], Sampling(max_tokens=50, temperature=0, ignore_eos=True))[0]
    assert len(result.token_ids) == 3 and result.finish_reason == "length"


def test_prompts_in_three_forms(engine, model):
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("hi")]
    assert engine.tokens_of("hi") == engine.tokens_of(ids) == ids
    chat = engine.tokens_of([{"role": "user", "content": "hi"}])
    assert chat[-1] == model.tokenizer.special["<|assistant|>"] and chat[:2] == [
        ids[0],
        model.tokenizer.special["<|user|>"],
    ]
    assert len(engine.generate([[{"role": "user", "content": "hi"}]] * 2, Sampling(max_tokens=1))) == 2
    assert len(engine.generate([{"role": "user", "content": "hi"}], Sampling(max_tokens=1))) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 600, "the prompt has 601 tokens, and the model's context of 512"),
        ([], "the prompt is empty"),
        ([3, 272], "outside the model's vocabulary of 272"),
        ([1.5], "a prompt is a string"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(engine, prompt, message):
    with pytest.raises(DataError, match=message):
        engine.generate(["fine", prompt], Sampling(max_tokens=1))
    assert not engine.waiting and not engine.running


def test_a_long_prompt_is_a_context_error(engine):
    with pytest.raises(ContextError):
        engine.tokens_of("y" * 600)

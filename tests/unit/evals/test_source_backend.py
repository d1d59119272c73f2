"""Encoder–decoders in task files: likelihoods by one forward over each pair, answers as the engine writes them, what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from evals_shared import CHOICE, COLOURS, read_json, read_lines, write_task

import luban
from luban.cli.main import main
from luban.core.errors import DataError, UnsupportedError
from luban.evals.backends.source import SourceBackend, local_backend
from luban.evals.requests import Roll, Score, Write

START = 2  # the token that the fixture's decoder begins with


@pytest.fixture(scope="module")
def model(tiny_translator):
    return luban.load_model(tiny_translator)


def brute_force(model, context, continuation):
    """By one forward: the source, and the decoder over its start token and the continuation."""
    tokenizer = model.need_tokenizer()
    source = tokenizer.encode(context, bos=model.begins_with_bos, eos=model.ends_with_eos)
    tail = tokenizer.encode(continuation)
    with torch.inference_mode():
        logits = model.module(torch.tensor([source]), torch.tensor([[START, *tail[:-1]]]))[0].double()
    logprobs = logits.log_softmax(-1)
    total = sum(logprobs[i, token].item() for i, token in enumerate(tail))
    return total, logprobs.argmax(-1).tolist() == tail


def words(rng, most):
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(rng.randint(1, most)))


@pytest.mark.parametrize(("tokens", "invariant"), [(8192, False), (1, False), (90, False), (8192, True)])
def test_continuations_are_scored_as_one_forward_over_each_would(tiny_translator, tokens, invariant):
    model, rng = luban.load_model(tiny_translator), random.Random()
    backend = local_backend(model, batch_tokens=tokens, batch_invariant=invariant)
    assert isinstance(backend, SourceBackend)
    pairs = [(words(rng, 8), words(rng, 4)) for _ in range(15)]
    found = backend.respond([Score(context=c, continuation=t) for c, t in pairs])
    for (context, text), response in zip(pairs, found, strict=True):
        total, greedy = brute_force(model, context, text)
        assert response.logprob == pytest.approx(total, rel=3e-6, abs=1e-4) and response.greedy == greedy
        assert response.tokens == len(text) and response.truncated == 0  # bytes are tokens here


def test_spaces_at_a_contexts_end_count_to_the_continuation_and_what_is_greedy_is_what_is_written(model):
    backend = local_backend(model)
    one, other = backend.respond([Score(context="a b ", continuation="c"), Score(context="a b", continuation=" c")])
    assert one.logprob == pytest.approx(other.logprob, abs=1e-5) and one.tokens == 2
    (written,) = backend.respond([Write(prompt="a b", max_tokens=5)])
    result = luban.Engine(model).generate("a b", luban.Sampling(max_tokens=5, temperature=0.0))[0]
    assert written.text == result.text and written.tokens == len(result.token_ids)


def test_a_long_source_loses_its_beginning_and_a_long_continuation_is_refused(model):
    backend = local_backend(model)  # context 64
    long, kept = backend.respond([Score(context="b" * 100, continuation="c"), Score(context="a", continuation="c")])
    assert long.truncated > 30 and kept.truncated == 0 and long.prompt_tokens == 64
    assert backend.counts["truncated"] == 1
    with pytest.raises(DataError, match=r"continuation of 70 tokens doesn't fit"):
        backend.respond([Score(context="a", continuation="c" * 70)])
    with pytest.raises(UnsupportedError, match="rolling tasks need a decoder"):
        backend.respond([Roll(text="abc")])


def test_task_files_run_on_an_encoder_decoder(tiny_translator, model, tmp_path):
    choice = write_task(tmp_path, "colours", CHOICE, COLOURS)
    kind = {"type": "generate", "max_tokens": 6, "metrics": ["equal"]}
    rows = [{"q": f"say {i}", "a": "x"} for i in range(3)]
    writing = write_task(tmp_path, "say", {"prompt": "{{q}}", "target": "{{a}}", "kind": kind}, rows)
    assert main(["eval", str(tiny_translator), choice, writing, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    results, answers = read_json(tmp_path / "out" / "results.json"), read_lines(tmp_path / "out" / "answers.jsonl")
    assert {"colours/acc", "say/equal"} <= results.keys() and len(answers) == 8
    for row, colour in zip(answers, COLOURS, strict=False):
        likelihoods = [brute_force(model, colour["q"], f" {option}")[0] for option in colour["options"]]
        assert row["answer"] == likelihoods.index(max(likelihoods))

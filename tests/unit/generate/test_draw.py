"""Everything that a request's settings change, all rows in one batch, against a slow reference of one row in numpy, and
against transformers' processors."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from luban.core.errors import ConfigError
from luban.generate.sampler import draw
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence, choose, processed

VOCABULARY = 37


def random_sampling(rng: random.Random) -> Sampling:
    """Settings of which each is as likely neutral as not."""

    def maybe(value, neutral):
        return value if rng.random() < 0.5 else neutral

    return Sampling(
        temperature=rng.choice([0, 0.5, 1.0, 1.8]),
        top_k=maybe(rng.randrange(1, 12), 0),
        top_p=maybe(rng.uniform(0.2, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        repetition_penalty=maybe(rng.uniform(0.6, 1.8), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        logit_bias=maybe({rng.randrange(VOCABULARY): rng.uniform(-5, 5) for _ in range(3)}, {}),
        min_tokens=rng.choice([0, 4]),
        logprobs=maybe(3, None),
        seed=rng.randrange(100),
    )


def random_sequence(rng: random.Random) -> Sequence:
    words = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 7))] for _ in range(2)]
    return Sequence(words[0], random_sampling(rng), seed=rng.randrange(1000), tokens=words[1], ends=(2, 5))


def reference(logits: np.ndarray, s: Sequence, quantile: float) -> tuple[int, float]:
    """One row, a token at a time: (token, log-probability under the sampling distribution)."""
    settings, x = s.sampling, logits.astype(np.float64).copy()
    for token in set(s.prompt + s.tokens):
        x[token] = x[token] / settings.repetition_penalty if x[token] > 0 else x[token] * settings.repetition_penalty
    for token in set(s.tokens):
        x[token] -= settings.presence_penalty + settings.frequency_penalty * s.tokens.count(token)
    for token, bias in settings.logit_bias:
        x[token] += bias
    if len(s.tokens) < settings.min_tokens:
        x[list(s.ends)] = -np.inf
    if settings.temperature == 0:
        return int(x.argmax()), 0.0
    p = np.exp((x - x.max()) / settings.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if settings.top_k:
        order = order[: settings.top_k]
    if settings.top_p < 1:
        kept, mass, whole = [], 0.0, sum(p[i] for i in order)
        for i in order:
            if mass >= settings.top_p * whole:
                break
            kept.append(i)
            mass += p[i]
        order = kept
    order = [i for i in order if p[i] >= settings.min_p * p[order[0]] and p[i] > 0]
    whole, reached = sum(p[i] for i in order), 0.0
    for i in order:
        reached += p[i]
        if reached > quantile * whole:
            break
    return i, float(np.log(p[i] / whole))


def test_a_batch_of_random_settings_equals_the_reference_row_by_row():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    logits = torch.randn(60, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    sequences = [random_sequence(rng) for _ in logits]
    quantiles = [rng.random() for _ in logits]
    ready = processed(logits, sequences, lambda s: s.prompt + s.tokens)
    tokens, logprobs = draw(ready, [s.sampling for s in sequences], quantiles)
    for row, sequence in enumerate(sequences):
        token, logprob = reference(logits[row].numpy(), sequence, quantiles[row])
        assert tokens[row] == token, (seed, row)
        assert logprobs[row].item() == pytest.approx(logprob, abs=1e-4), (seed, row)


def test_both_log_probabilities_are_reported_by_name():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    logits = torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    sequences = [random_sequence(rng) for _ in logits]
    own = logits.double().log_softmax(-1)
    for row, (token, s) in enumerate(
        zip(choose(logits, sequences, lambda s: s.prompt + s.tokens), sequences, strict=True)
    ):
        assert s.tokens[-1] == token
        if s.sampling.logprobs is None:
            assert not s.logprobs
            continue
        (entry,) = s.logprobs
        assert entry.token == token and entry.logprob == pytest.approx(own[row, token].item(), abs=1e-5)
        s.tokens.pop()
        quantile_free = reference(logits[row].numpy(), s, 0.0)[1] if s.sampling.temperature == 0 else None
        assert entry.sampling_logprob <= 1e-9 and (quantile_free is None or entry.sampling_logprob == 0)
        best = own[row].topk(s.sampling.logprobs)
        assert [t for t, _ in entry.top] == best.indices.tolist()


def test_a_seed_gives_the_same_token_whoever_shares_the_batch():
    rng = random.Random()
    logits = torch.randn(24, VOCABULARY) * 3
    sequences = [random_sequence(rng) for _ in logits]
    copies = [Sequence(s.prompt, s.sampling, s.seed, tokens=list(s.tokens), ends=s.ends) for s in sequences]
    together = choose(logits, sequences, lambda s: s.prompt + s.tokens)
    alone = [choose(logits[i : i + 1], [copies[i]], lambda s: s.prompt + s.tokens)[0] for i in range(24)]
    assert together == alone


@pytest.mark.parametrize("name", ["repetition", "top_k", "top_p", "min_p"])
def test_filters_and_penalties_are_those_of_transformers(name):
    """Equal sets of tokens, and equal probabilities of them."""
    theirs = pytest.importorskip("transformers.generation.logits_process")
    for _ in range(10):
        logits, seen = torch.randn(1, VOCABULARY) * 3, [random.randrange(VOCABULARY) for _ in range(6)]
        value = {"repetition": 1.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}[name]
        make, ours = {
            "repetition": (theirs.RepetitionPenaltyLogitsProcessor, {"repetition_penalty": value}),
            "top_k": (theirs.TopKLogitsWarper, {"top_k": value}),
            "top_p": (theirs.TopPLogitsWarper, {"top_p": value}),
            "min_p": (theirs.MinPLogitsWarper, {"min_p": value}),
        }[name]
        want = make(value)(torch.tensor([seen]), logits.clone()).softmax(-1)[0]
        sequence = Sequence(seen, Sampling(**ours), seed=0)
        steps = 2000
        rows = processed(logits, [sequence], lambda s: s.prompt).expand(steps, -1)
        tokens = draw(rows, [sequence.sampling] * steps, [(i + 0.5) / steps for i in range(steps)]).tokens_B
        share = torch.bincount(tokens, minlength=VOCABULARY) / steps
        assert (share - want).abs().max() <= 1.01 / steps


def test_a_token_that_no_mask_and_no_logit_allows_is_none():
    logits = torch.full((2, 6), float("-inf"))
    logits[:, 2] = 1.0
    sequences = [Sequence([1], Sampling(min_tokens=n), seed=0, ends=(2,)) for n in (1, 0)]
    assert choose(logits, sequences, lambda s: s.prompt) == [None, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", [3]),
        ("min_tokens", -1),
        ("min_tokens", 300),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1.5,)),
        ("prompt_logprobs", 21),
    ],
)
def test_new_fields_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})

"""RAG's two marginals, their decoding and gradients, against sums over every passage and every answer."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from tiny_models import write_checkpoint

import luban
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.retrieval.rag.decoding import decode, search
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.marginal import marginal

KINDS = ("sequence", "token")


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def generator(request, tmp_path_factory) -> Generator:
    """Over bytes; every other token than the four of `LETTERS` and the end is impossible, so that answers can be counted."""
    body = {"body": EncoderDecoderBody(decoder_start=2)} if request.param == "encoder-decoder" else {}
    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=256,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=32),
        init=NormalInit(std=0.5),
        head=LanguageModel(bias=True),
        **body,
    )
    folder = write_checkpoint(tmp_path_factory.mktemp("rag") / "model", spec, seed=random.randrange(99))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    made = Generator(luban.load_model(folder))
    kept = [*letters(made), made.model.stop_ids[0]]
    bias = made.model.module.head.bias
    with torch.no_grad():
        bias.fill_(-1e4)
        bias[kept] = 0.0
    return made


def letters(generator: Generator) -> list[int]:
    return [generator.tokenizer.encode(letter)[0] for letter in "abc"]


def case(generator: Generator, passages: int = 3) -> tuple[list[list[int]], torch.Tensor]:
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    made = [
        generator.prompt("what?", " ".join(random.choices(words, k=random.randint(1, 9))), 8) for _ in range(passages)
    ]
    return made, torch.randn(passages).log_softmax(0)


def every_answer(generator: Generator, longest: int) -> list[list[int]]:
    """Those that end, and those that are cut at `longest` tokens."""
    end = generator.model.stop_ids[0]
    ended = [[*body, end] for length in range(longest) for body in itertools.product(letters(generator), repeat=length)]
    return [*ended, *map(list, itertools.product(letters(generator), repeat=longest))]


@torch.no_grad()
def by_hand(generator: Generator, kind: str, prompts, priors, answer) -> float:
    """With whole forward passes, one passage and one token at a time."""
    module, each = generator.model.module, []
    for prompt in prompts:
        first, row = generator.prompts.first_tokens(prompt), []
        for at, token in enumerate(answer):
            ids = torch.tensor([[*first, *answer[:at]]])
            logits = module(torch.tensor([prompt]), ids) if generator.model.spec.body.two_sided else module(ids)
            row.append(logits[0, -1].double().log_softmax(-1)[token])
        each.append(torch.stack(row))
    found, weights = torch.stack(each).exp(), priors.double().exp()
    whole = (weights * found.prod(1)).sum() if kind == "sequence" else (weights[:, None] * found).sum(0).prod()
    return whole.log().item()


def test_marginals_are_the_sums(generator):
    prompts, priors = case(generator)
    for answer in random.sample(every_answer(generator, 4), 5):
        logprobs = generator.logprobs(prompts, [answer] * len(prompts))
        for kind in KINDS:
            found = marginal(kind, priors[None], logprobs[None]).item()
            assert found == pytest.approx(by_hand(generator, kind, prompts, priors, answer), abs=1e-4)
        one = [marginal(kind, torch.zeros(1, 1), logprobs[None, :1]).item() for kind in KINDS]
        assert one[0] == pytest.approx(one[1], abs=1e-5)  # with one passage they are the same


def test_answers_of_different_lengths_in_one_batch(generator):
    prompts, _ = case(generator)
    answers = random.sample(every_answer(generator, 5), len(prompts))
    together = generator.logprobs(prompts, answers)
    for prompt, answer, row in zip(prompts, answers, together, strict=True):
        torch.testing.assert_close(row[: len(answer)], generator.logprobs([prompt], [answer])[0], rtol=1e-4, atol=1e-4)
        assert not row[len(answer) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_wide_beams_find_the_likeliest_of_all_answers(generator, kind):
    prompts, priors = case(generator)
    answers = every_answer(generator, 3)
    right = {tuple(answer): by_hand(generator, kind, prompts, priors, answer) for answer in answers}
    found = decode(generator, kind, prompts, priors, beams=len(answers), max_tokens=3)
    assert found[0].logprob == pytest.approx(max(right.values()), abs=1e-4)
    assert found[0].tokens == max(right, key=right.__getitem__)
    for each in found:
        assert each.logprob == pytest.approx(right[each.tokens], abs=1e-4)
        assert sum(each.responsibilities_K) == pytest.approx(1)
    if kind == "token":
        for answer, logprob in search(generator, prompts, priors, len(answers), 3).items():
            assert logprob == pytest.approx(right[answer], abs=1e-4)
        assert torch.tensor(list(right.values())).exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_fast_decoding_is_never_above_thorough(generator):
    for beams in (1, 2):
        prompts, priors = case(generator, 4)
        thorough, fast = (
            {
                d.tokens: d.logprob
                for d in decode(generator, "sequence", prompts, priors, decoding=way, beams=beams, max_tokens=5)
            }
            for way in ("thorough", "fast")
        )
        assert set(thorough) == set(fast)
        assert all(fast[tokens] <= thorough[tokens] + 1e-6 for tokens in fast)


def test_with_one_passage_every_way_is_the_same(generator):
    prompts, priors = case(generator, 1)
    found = [
        decode(generator, kind, prompts, priors, decoding=way, beams=3, max_tokens=5)[0]
        for kind, way in (("sequence", "thorough"), ("sequence", "fast"), ("token", "thorough"))
    ]
    assert len({each.tokens for each in found}) == 1
    assert found[0].logprob == pytest.approx(found[1].logprob) == pytest.approx(found[2].logprob, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_passages_probabilities(kind):
    scores, logprobs = torch.randn(2, 3, dtype=torch.float64), -torch.rand(2, 3, 4, dtype=torch.float64)
    scores.requires_grad_(), logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: marginal(kind, (s / 0.3).log_softmax(1), p), (scores, logprobs))


def test_a_long_passage_is_cut_to_the_context(generator):
    ids = generator.prompt("what is it?", "word " * 500, 8)
    assert len(ids) + (0 if generator.model.spec.body.two_sided else 8) <= 256
    assert "what is it?" in generator.tokenizer.decode(ids)
    assert generator.text(generator.answer("bca", 8)) == "bca"
    assert len(generator.answer("a" * 50, 8)) == 8

"""RAG's two marginals, their decoding and gradients, against sums over every passage and every answer."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
import warm
from rag_models import write_facts
from tiny_models import write_checkpoint

import luban
from luban.core.errors import DataError, LineageError
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import Index
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.questions import read_questions
from luban.retrieval.rag.asking import RagAsker
from luban.retrieval.rag.decoding import decode, search
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.marginal import marginal
from luban.retrieval.rag.model import load_rag
from luban.retrieval.rag.train import answer_logprobs, train_rag, untrained

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


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def asked(request, tmp_path_factory):
    """(folder, recipe) of `write_facts`."""
    folder = tmp_path_factory.mktemp("asked")
    return folder, write_facts(folder, two_sided=request.param == "encoder-decoder")


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_generator_and_questions_but_no_passage(asked, tmp_path, kind):
    folder, recipe = asked
    figures = train_rag(replace(recipe, marginal=kind), tmp_path / "rag")
    assert figures["last_loss"] < figures["first_loss"]
    index, rag = Index(folder / "index"), load_rag(tmp_path / "rag")
    (found,) = rag.find(index, ["what is tin?"], 2)
    assert found.priors_K.exp().sum().item() == pytest.approx(1, abs=1e-5)
    query = rag.questions.queries(["what is tin?"])[0]
    assert (query != index.encoder.queries(["what is tin?"])[0]).any()  # the index's encoder is as it was
    scores = torch.tensor([float(query @ index.encoder.passages([hit.passage.titled])[0]) for hit in found.hits])
    torch.testing.assert_close(found.priors_K, (scores / recipe.temperature).log_softmax(0), rtol=1e-3, atol=1e-3)
    answer = RagAsker(index, rag, beams=2, max_tokens=6).ask("what is tin?")
    assert answer.citations[0].hit.passage.text in {hit.passage.text for hit in found.hits}


def test_the_question_encoders_gradient_is_the_differences(asked):
    folder, recipe = asked
    index = Index(folder / "index")
    rag = untrained(replace(recipe, temperature=0.5, k=len(index)), index)  # no other passages beside the point
    weight = rag.questions.model.module.double().decoder.blocks["0"].mixer.qkv.v.weight.requires_grad_()
    rag.generator.model.module.double()
    questions = read_questions(recipe.data)[:2]

    def loss() -> torch.Tensor:
        return answer_logprobs(rag, index, questions, 8).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * 1e-5 * direction
            ends.append(loss().item())
            weight -= sign * 1e-5 * direction
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


def test_questions_without_passages_are_left_out_and_said(asked, tmp_path, capsys):
    folder, recipe = asked
    build_index(DocumentReader([str(folder / "texts.jsonl")]), tmp_path / "bm25", IndexConfig(rule=WholeDocument()))
    rows = [{"question": "what is tin?", "answers": ["grey"]}, {"question": "wer?", "answers": ["niemand"]}]
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    words = replace(recipe, data=tmp_path / "asked.json", index=tmp_path / "bm25", batch_size=1, temperature=1.0)
    assert train_rag(words, tmp_path / "rag")["questions"] == 1
    assert "1 of 2 questions are left out of training" in capsys.readouterr().err
    (tmp_path / "asked.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="finds no passage for any of 1 questions"):
        train_rag(words, tmp_path / "none")


def test_an_index_of_another_encoder_is_refused(asked, tmp_path):
    folder, recipe = asked
    rag = untrained(recipe, Index(folder / "index"))
    build_index(DocumentReader([str(folder / "texts.jsonl")]), tmp_path / "bm25", IndexConfig())
    with pytest.raises(LineageError, match="has no vectors: build the index with that encoder"):
        RagAsker(Index(tmp_path / "bm25"), rag)
    common = {"vocab_size": 272, "width": 32, "mixer": Grouped(heads=2), "feedforward": SwiGLU(width=32)}
    other = luban.load_model(write_checkpoint(tmp_path / "other", uniform(layers=1, context=64, **common), 2))
    luban.export_model(other, tmp_path / "encoder")
    config = IndexConfig(retriever="dense", encoder=str(tmp_path / "encoder"))
    build_index(DocumentReader([str(folder / "texts.jsonl")]), tmp_path / "index", config)
    with pytest.raises(LineageError, match="was built with another one: build the index with that encoder"):
        RagAsker(Index(tmp_path / "index"), rag)


def test_the_command_trains_and_answers(asked, tmp_path):
    folder, recipe = asked
    (tmp_path / "recipe.toml").write_text('type = "rag"\nk = 2\nbatch_size = 3\nheldout = 0.0\nanswer_tokens = 8\n')
    words = ("--data", recipe.data, "--index", recipe.index, "--model", recipe.model, "--out", tmp_path / "rag")
    done = warm.command("rag", "train", tmp_path / "recipe.toml", *words)
    assert done.returncode == 0 and "6 questions, loss" in done.stderr, done.stderr
    done = warm.command("rag", "ask", folder / "index", tmp_path / "rag", "what is tin?", "--max-tokens", 4, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["citations"], done.stderr
    done = warm.command("rag", "eval", folder / "index", recipe.data, "--model", tmp_path / "rag", "--beams", 1)
    assert done.returncode == 0 and "exact match" in done.stdout, done.stderr
    done = warm.command("generate", tmp_path / "rag", "hi")
    assert done.returncode == 1 and "holds a rag" in done.stderr

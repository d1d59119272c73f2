"""Training of encoders: DPR's loss by definition, chunks that change nothing, pairs that leak nothing."""

from __future__ import annotations

import json
import math
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm

from luban.core.errors import ConfigError, DataError
from luban.core.plan import ParallelPlan
from luban.parallel.world import World
from luban.retrieval.encoder import TextEncoder
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.training.contrastive import backward, in_batch_loss
from luban.retrieval.training.optimiser import Optimiser
from luban.retrieval.training.pairs import MINED, Pair, mine, split
from luban.retrieval.training.train import EncoderRecipe, by_vectors, compared, ranks, texts_of, train_encoder


def test_the_loss_is_the_definition_and_ln_2b_at_chance():
    questions, passages = torch.randn(4, 6), torch.randn(8, 6)
    expected = 0.0
    for i in range(4):
        scores = [math.exp(float(questions[i] @ passages[j]) / 0.7) for j in range(8)]
        expected -= math.log(scores[i] / sum(scores)) / 4
    assert float(in_batch_loss(questions, passages, 0.7)) == pytest.approx(expected, rel=1e-5)
    assert float(in_batch_loss(questions, torch.ones(8, 6), 1.0)) == pytest.approx(math.log(2 * 4), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk):
    table = torch.randn(20, 5, dtype=torch.float64, requires_grad=True)
    texts = [[random.randrange(20) for _ in range(random.randrange(1, 6))] for _ in range(12)]

    def encode(group):
        return torch.stack([torch.tanh(table[text].mean(0)) for text in group])

    loss = in_batch_loss(encode(texts[:4]), encode(texts[4:]), 0.3)
    (expected,) = torch.autograd.grad(loss, table)
    found = backward(encode, encode, texts[:4], texts[4:], temperature=0.3, chunk=chunk)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(table.grad, expected, rtol=1e-10, atol=1e-12)


def encoded(table, group):
    return torch.stack([torch.tanh(table[text].mean(0)) for text in group])


def worker(rank, count, folder, table, texts, chunk):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank))
    plan = ParallelPlan(replicate=count)
    world, table = World.join(plan, torch.device("cpu")), table.clone().requires_grad_()
    encode = partial(encoded, table)
    optimiser = Optimiser([table], lr=0.1, total=2, clip=0.5, world=world)
    losses = []
    for _ in range(2):
        losses.append(backward(encode, encode, texts[:4], texts[4:], temperature=0.3, chunk=chunk, world=world))
        optimiser.step()
    torch.save((losses, table.detach()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("count", "chunk"), [(2, 3), (3, 100)])
def test_processes_are_negatives_of_each_other_and_learn_what_one_does(count, chunk, tmp_path):
    """With chunks of 100 the third process has none."""
    table = torch.randn(20, 5, dtype=torch.float64)
    texts = [[random.randrange(20) for _ in range(random.randrange(1, 6))] for _ in range(12)]
    warm.processes(worker, count, count, str(tmp_path), table, texts, chunk)
    alone, losses = table.clone().requires_grad_(), []
    optimiser, encode = Optimiser([alone], lr=0.1, total=2, clip=0.5), partial(encoded, alone)
    for _ in range(2):
        losses.append(backward(encode, encode, texts[:4], texts[4:], temperature=0.3, chunk=chunk))
        optimiser.step()
    for rank in range(count):
        found, weights = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(weights, alone.detach(), rtol=1e-9, atol=1e-12)


def question(number, text=None, **fields):
    passage = ("", f"passage {number} about {text or number}")
    return Question(text=f"what about {number}", answers=(f"answer{number}",), positives=(passage,), **fields)


def test_questions_about_one_passage_are_on_one_side():
    questions = [question(number % 50) for number in range(200)]
    train, heldout = split(questions, 0.4, 1)
    held = {q.positives[0] for q in heldout}
    assert len(train) + len(heldout) == 200 and 20 < len(heldout) < 140
    assert not held & {q.positives[0] for q in train}


def test_hard_negatives_look_alike_and_hold_no_answer():
    questions = [
        Question(text="red apple", answers=("sweet",), positives=(("", "the red apple is sweet"),)),
        Question(text="apple pie", answers=("warm",), positives=(("", "apple pie is warm and sweet"),)),
        Question(text="red car", answers=("fast",), positives=(("", "a red car is fast"),), negatives=(("", "mine"),)),
    ]
    pairs = mine(questions, 1)
    assert pairs[0].wrong == (("", "a red car is fast"),)  # the pie is nearer, and sweet
    assert pairs[2].wrong == (("", "mine"),)
    with pytest.raises(DataError, match="at least 2"):
        mine(questions[:1], 1)


def test_self_mined_negatives_are_the_nearest_passages_without_an_answer():
    class Encoder:  # of numbers that texts hold: near are those with a near angle
        def passages(self, texts):
            angles = np.array([float(text.split()[-1]) for text in texts])
            return np.stack([np.cos(angles), np.sin(angles)], 1)

        queries = passages

    rng = random.Random()
    angles = [round(rng.uniform(0, 3), 6) for _ in range(30)]
    questions = [
        Question(text=f"q {angle}", answers=(f"w{number % 7}",), positives=(("", f"w{number % 7} {angle}"),))
        for number, angle in enumerate(angles)
    ]
    pairs = mine(questions, 3, partial(by_vectors, Encoder()))
    for number, pair in enumerate(pairs):
        far = sorted(range(30), key=lambda other: abs(angles[other] - angles[number]))
        expected = [("", f"w{other % 7} {angles[other]}") for other in far[:MINED] if other % 7 != number % 7][:3]
        assert pair.right == questions[number].positives[0] and list(pair.wrong) == expected


def test_a_passage_is_no_negative_of_its_own_question():
    a, b, c = (("", letter) for letter in "abc")
    batch = [
        Pair(question="1", right=a, wrong=(b,)),
        Pair(question="2", right=b, wrong=(c,)),
        Pair(question="3", right=a, wrong=(c,)),
    ]
    assert texts_of(batch) == (["1", "2"], ["a", "b", "c"])


@pytest.mark.parametrize("towers", [1, 2])
def test_training_ranks_held_out_passages_better_and_the_encoder_is_whole(tmp_path, towers):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(0)
    names = [f"n{i}" for i in range(12)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *names, *(f"m{i}" for i in range(12))]
    start = tmp_path / "start"
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(start)
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(start)
    rows = []
    for _ in range(90):  # a question names two things by other words than its passage
        chosen = sorted(rng.sample(range(12), 2))
        passage = {"title": "", "text": " ".join(f"m{i}" for i in chosen)}
        rows.append({"question": " ".join(f"n{i}" for i in chosen), "answers": ["x"], "positive_ctxs": [passage]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    settings = {"heldout": 0.2, "batch_size": 16, "epochs": 8, "lr": 1e-2, "temperature": 0.1, "towers": towers}
    settings["mined_by"] = "encoder" if towers == 2 else "bm25"
    recipe = EncoderRecipe(data=tmp_path / "data.json", encoder=str(start), **settings)
    figures = train_encoder(recipe, tmp_path / "encoder")
    before, after = figures["heldout"]["average_rank"]
    assert after < before / 2
    tuned = TextEncoder.load(tmp_path / "encoder")
    assert (tuned.questions is tuned.model) == (towers == 1)
    alike = np.allclose(tuned.queries(["n1 n2"]), tuned.passages(["n1 n2"]))
    assert alike == (towers == 1)
    questions = read_questions(tmp_path / "data.json")
    collection = list(dict.fromkeys(q.positives[0] for side in split(questions, 0.2, 0) for q in side))
    assert ranks(tuned, split(questions, 0.2, 0)[1], collection).mean() == pytest.approx(after)
    assert train_encoder(recipe, tmp_path / "again") == figures


def test_held_out_figures_compare_question_by_question():
    figures = compared(np.array([1, 3, 2, 4]), np.array([1, 1, 1, 2]))
    assert figures["average_rank"] == [2.5, 1.25] and figures["top_1"] == [0.25, 0.75]
    low, high = figures["top_1_gain_interval"]
    assert 0 <= low <= 0.5 <= high <= 1


def test_impossible_recipes_are_refused():
    for fields in ({"batch_size": 0}, {"lr": 0.0}, {"heldout": 1.0}, {"negatives": -1}):
        with pytest.raises(ConfigError):
            EncoderRecipe(**fields)

"""Several tasks over one model: sampling, gradients, the plain objective as its special case, runs, and their conflict."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_data import WORDS, make_shards, tensors

import luban
from luban.cli.main import main
from luban.core.artifact import read_manifest
from luban.core.config import from_dict, merge
from luban.core.errors import ConfigError, LineageError
from luban.data.collate.multitask import MultitaskRows, Task, divide, mixing_shares
from luban.data.loader import Loader
from luban.data.packing.stream import StreamPacking
from luban.data.shards import Shards
from luban.models.build import build_model
from luban.models.config import resolve_spec
from luban.objectives.base import Objective
from luban.objectives.multitask import Multitask
from luban.train.conflict import cosine
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe

MODEL = {
    "width": 32,
    "layers": 2,
    "context": 64,
    "tied_head": True,
    "layer": {"mixer": {"heads": 2, "kv_heads": 1}, "feedforward": {"width": 48}},
}
HEADS = {
    "type": "multitask",
    "heads": [
        {"name": "text", "head": {"type": "language_model"}},
        {"name": "kind", "head": {"type": "classes", "count": 2, "pooling": "last", "dense": False}},
    ],
}
ENCODER = {
    "body": {"type": "encoder", "segments": 2},
    "position": {"type": "learned"},
    "head": {
        "type": "multitask",
        "heads": [
            {"name": "text", "head": {"type": "masked_lm"}},
            {"name": "kind", "head": {"type": "classes", "count": 2}},
        ],
    },
}
LABELLED = {"type": "labelled", "labels": ["tame", "wild"]}
RUN = {
    "model": MODEL,
    "optim": {"lr": 0.01},
    "schedule": {"warmup": 2},
    "train": {"steps": 6, "batch_size": 8, "seq_len": 32, "device": "cpu", "log_every": 1},
    "checkpoint": {"every": 2},
    "validation": {"every": 3, "batches": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of text, and labelled texts packed with the same tokenizer."""
    folder, draw = tmp_path_factory.mktemp("multitask"), random.Random(0)
    make_shards(folder / "text", vocab_size=400)
    rows = []
    for i in range(160):
        words = [draw.choice([w for w in WORDS if w != "river"]) for _ in range(6)] + [str(i)]
        wild = draw.random() < 0.5
        words[0] = "river" if wild else words[0]
        said = ["user", " ".join(words)], ["assistant", ("tame", "wild")[wild]]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = folder / "text" / "tokenizer"
    for command in (
        ["corpus", "build", folder / "rows.jsonl", "--out", folder / "corpus", "--heldout", "0.2"],
        ["data", "pack", folder / "corpus", "--tokenizer", tokenizer, "--out", folder / "labelled"],
    ):
        assert not main([str(part) for part in command])
    return folder


def recipe(folder, **sections) -> Recipe:
    return from_dict(Recipe, merge({**RUN, "data": {"path": str(folder / "text" / "shards")}}, sections))


def two_tasks(folder, first="causal", **options) -> dict:
    tasks = [
        {"name": "text", "objective": {"type": first}, "weight": 1},
        {"name": "kind", "objective": LABELLED, "weight": 1, "data": str(folder / "labelled")},
    ]
    return {"type": "multitask", "tasks": tasks, **options}


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last_weights(run) -> dict:
    return load_file(run / "checkpoints" / "step_000006" / "model.safetensors")


@pytest.mark.parametrize(
    ("average", "objective"), [("rows", {"type": "causal", "z_loss": 1e-3}), ("targets", {"type": "prefix"})]
)
def test_one_task_alone_is_the_plain_objective_bit_for_bit(folder, tmp_path, average, objective):
    model = {"position": {"type": "learned"}}
    plain = pretrain(recipe(folder, model=model, objective=objective), tmp_path / "plain", "plain")
    alone = {"type": "multitask", "average": average, "tasks": [{"name": "only", "objective": objective}]}
    run = pretrain(recipe(folder, model=model, objective=alone), tmp_path / "run", "run")
    ours, theirs = last_weights(run), last_weights(plain)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    one, two = ([row["loss"] for row in rows_of(each) if "loss" in row] for each in (run, plain))
    assert one == two


@pytest.mark.parametrize("first", ["causal", "masked"])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_gradients_are_the_sum_of_the_tasks_gradients_however_the_batch_is_cut(folder, first, pieces):
    shards = Shards.open(folder / "text" / "shards")
    body = {"head": HEADS} if first == "causal" else ENCODER
    spec = resolve_spec(merge(MODEL, body), shards.vocab_size)
    model = build_model(spec).double()
    objective = from_dict(Objective, two_tasks(folder, first))
    rows = objective.examples(shards, seq_len=32, seed=3, packing="fit")
    batch = Loader(shards, batch_size=8, seq_len=32, seed=3, packing=rows).batch(0)
    assert {task.name for task in batch.tasks} == {"text", "kind"}
    loss = objective.loss(model)
    for part in batch.cut(tensors(batch), pieces):
        loss(part).sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for task in batch.tasks:  # each plainly, over the model whose head is the task's
        part = next(each.objective for each in objective.tasks if each.name == task.name)
        heads, model.head = model.head, model.head.heads[task.name]
        (part.loss(model)(tensors(task.batch)).sum * task.factor).backward()
        model.head = heads
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_a_row_counts_the_same_whatever_its_number_of_targets(folder):
    shards = Shards.open(folder / "text" / "shards")
    batch_of = {}
    for average in ("rows", "targets"):
        objective = from_dict(Objective, two_tasks(folder, average=average))
        rows = objective.examples(shards, seq_len=32, seed=0, packing="fit")
        batch_of[average] = rows.gather(np.arange(rows.rows))
    one, two = batch_of["rows"].tasks
    per_row = [task.batch.target_count * task.factor / len(task.places) for task in (one, two)]
    assert per_row[0] == pytest.approx(per_row[1], rel=0.1)  # the mean is over 64 rows
    assert {task.factor for task in batch_of["targets"].tasks} == {1.0}


class Numbers(StreamPacking):
    """Rows that say their own number and pass: tokens (B, 2)."""

    def __init__(self, rows):
        self.rows = rows

    def gather(self, rows, epochs=None):
        from luban.data.batch import Batch

        tokens = np.stack([rows, np.zeros_like(rows) if epochs is None else epochs], axis=1)
        real = np.repeat(rows[:, None] >= 0, 2, axis=1)
        documents = np.where(real, 0, -1).astype(np.int32)
        return Batch(tokens=tokens, targets=tokens, loss_mask=real, documents=documents, positions=documents * 0)


def test_every_task_has_its_share_of_each_epoch_and_goes_through_all_its_rows_before_any_again():
    sizes, shares = {"a": 50, "b": 7, "c": 300}, (0.5, 0.3, 0.2)
    tasks = [
        Task(name=name, packing=Numbers(size), share=s) for (name, size), s in zip(sizes.items(), shares, strict=True)
    ]
    rows = MultitaskRows(tasks, seed=5, average="targets")
    assert rows.rows == 357 and rows.quotas.tolist() == divide(357, shares).tolist() and rows.quotas.sum() == 357
    seen = {name: [] for name in sizes}
    for epoch in range(4):
        batch = rows.gather(np.arange(357), np.full(357, epoch))
        for task, quota in zip(batch.tasks, rows.quotas, strict=True):
            assert len(task.places) == quota
            seen[task.name] += [(int(epoch_), int(row)) for row, epoch_ in task.batch.tokens]
    for name, size in sizes.items():
        passes = len(seen[name]) // size
        assert len(set(seen[name])) == len(seen[name])
        for each in range(passes):
            assert {row for epoch, row in seen[name] if epoch == each} == set(range(size))
    pieces = rows.gather(np.array([3, 200, -1, 340]))
    assert [task.places.tolist() for task in pieces.tasks] == [[0], [1, 2], [3]]  # padding follows the row before it
    assert pieces.tasks[1].batch.tokens[1, 0] == -1


def test_shares_by_size_limit_and_temperature_are_t5s():
    sizes = [100, 1000, 50_000]
    assert mixing_shares(sizes) == pytest.approx([s / 51_100 for s in sizes])
    roots = [100**0.5, 1000**0.5, 2000**0.5]
    assert mixing_shares(sizes, limit=2000, temperature=2) == pytest.approx([r / sum(roots) for r in roots])
    assert np.abs(np.array(mixing_shares(sizes, temperature=1e6)) - 1 / 3).max() < 1e-5
    assert divide(10, [1, 1, 1]).tolist() == [4, 3, 3] and divide(4, [1e-9, 2, 1]).tolist() == [1, 2, 1]


def test_an_encoders_run_resumes_bitwise_and_its_heads_can_be_taken_alone(folder, tmp_path):
    changes = {"model": ENCODER, "objective": two_tasks(folder, "masked"), "schedule": {"type": "constant"}}
    whole = pretrain(recipe(folder, **changes), tmp_path / "whole", "whole")
    pretrain(recipe(folder, **merge(changes, {"train": {"steps": 3}})), tmp_path / "halves", "halves")
    halves = pretrain(recipe(folder, **changes), tmp_path / "halves", "halves")
    ours, theirs = last_weights(halves), last_weights(whole)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    head = ENCODER["head"]["heads"][1]["head"]
    tuned = from_dict(
        Recipe,
        {
            "init": str(whole),
            "model": {"head": head},
            "objective": LABELLED,
            "data": {"path": str(folder / "labelled")},
            "optim": {"lr": 1e-30},
            "train": {**RUN["train"], "steps": 1},
        },
    )
    alone = luban.load_model(pretrain(tuned, tmp_path / "alone", "alone"))
    together = luban.load_model(whole)
    tokens = torch.randint(20, 200, (2, 9))
    hidden = together.module(tokens, output="hidden")
    torch.testing.assert_close(alone.module(tokens), together.module.head.heads["kind"](hidden), rtol=1e-5, atol=1e-6)


def test_a_decoders_run_measures_tasks_and_conflict_and_generates_by_its_first_head(folder, tmp_path):
    changes = {"model": {"head": HEADS}, "objective": two_tasks(folder)}
    whole = pretrain(recipe(folder, **changes), tmp_path / "whole", "whole")
    cut_up = pretrain(recipe(folder, **merge(changes, {"train": {"accumulate": 4}})), tmp_path / "cut", "cut")
    one, two = ([row["loss"] for row in rows_of(each) if "loss" in row] for each in (cut_up, whole))
    assert one == pytest.approx(two, rel=2e-3)
    measured = [row for row in rows_of(whole) if "heldout_loss" in row][-1]
    assert -1 <= measured["gradient_cosine/text/kind"] <= 1 and measured["gradient_norm/kind"] > 0
    shares = {name: share for name, (share, _) in _tasks(folder, changes["objective"], "heldout").items()}
    want = sum(share * measured[f"heldout_loss/{name}"] for name, share in shares.items())
    assert measured["heldout_loss"] == pytest.approx(want)
    assert [p.role for p in read_manifest(whole).parents] == ["shards", "shards of kind"]
    assert not main(["report", str(whole), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "below 0: they conflict" in page and "text and kind" in page
    model, sampling = luban.load_model(whole), luban.Sampling(max_tokens=1, temperature=0, ignore_eos=True)
    result = luban.Engine(model).generate("the cat", sampling)[0]
    hidden = model.module(torch.tensor([result.prompt_token_ids]), output="hidden")
    assert result.token_ids == [model.module.head.heads["text"](hidden)[0, -1].argmax().item()]


def _tasks(folder, objective, split):
    objective = from_dict(Objective, objective)
    shards = Shards.open(folder / "text" / "shards", split)
    return objective.tasks_of(objective.examples(shards, seq_len=32, seed=0, packing="stream"))


def test_cosines_are_over_the_parameters_that_both_tasks_reach():
    one = {"body": torch.tensor([1.0, 2.0]), "head_a": torch.tensor([9.0]), "head_b": torch.zeros(1)}
    two = {"body": torch.tensor([2.0, -1.0]), "head_a": torch.zeros(1), "head_b": torch.tensor([7.0])}
    assert cosine(one, two) == 0
    assert cosine(one, {**two, "body": torch.tensor([-3.0, -6.0])}) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": {"type": "multitask"}}, "needs one or more tasks"),
        ({"model": {"head": HEADS}, "plan": {"shard": 2}}, "needs 2 processes"),
        ({"model": {"head": HEADS}, "train": {"compile": True}}, r"does not go with train\.compile"),
        ({"model": {}}, "body decoder with head multitask, and this one has body decoder and head language_model"),
        (
            {"model": {"head": {**HEADS, "heads": [HEADS["heads"][0], {"name": "kind", "head": "language_model"}]}}},
            "task kind: objective labelled trains a head classes, not language_model",
        ),
        ({"model": {"head": {**HEADS, "heads": HEADS["heads"][:1]}}}, "the model has no head 'kind'"),
        ({"model": merge(ENCODER, {"head": HEADS})}, "trains a model of body decoder with head multitask"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        pretrain(recipe(folder, **{"objective": two_tasks(folder), **changes}), tmp_path / "run", "run")
    assert not list(tmp_path.iterdir())


def test_data_of_another_tokenizer_is_refused(folder, tmp_path):
    make_shards(tmp_path / "other", vocab_size=350, seed=4)
    objective = two_tasks(folder)
    objective["tasks"][1] |= {"data": str(tmp_path / "other" / "shards"), "objective": {"type": "causal"}}
    with pytest.raises(LineageError, match="tokenizer"):
        pretrain(recipe(folder, objective=objective), tmp_path / "run", "run")
    assert isinstance(from_dict(Objective, objective), Multitask) and not (tmp_path / "run").exists()

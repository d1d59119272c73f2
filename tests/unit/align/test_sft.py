"""Instruction tuning: what is trained on, what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_data import make_shards, write_conversations

from luban.align import start as align_start
from luban.align.sft import SFTRecipe, sft, with_shards
from luban.cli.main import main
from luban.core.artifact import open_artifact, read_manifest
from luban.core.config import from_dict
from luban.core.errors import ArtifactError, ConfigError, DataError, LineageError, UsageError
from luban.core.lineage import ancestor
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import document_spans
from luban.load.model import load_model
from luban.tokenizer.tokenizer import load_tokenizer
from luban.train import start as start_module
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe

TINY = {
    "schedule": {"warmup": 2},
    "checkpoint": {"every": 10},
    "validation": {"every": 0, "batches": 1},
    "optim": {"type": "adamw", "lr": 3e-3},
    "train": {"steps": 10, "batch_size": 8, "seq_len": 64, "device": "cpu", "log_every": 1},
}
MODEL = {
    "width": 32,
    "layers": 2,
    "context": 64,
    "tied_head": True,
    "layer": {"mixer": {"heads": 2, "kv_heads": 1}, "feedforward": {"width": 48}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pretrained run beside the shards it was trained on."""
    folder = tmp_path_factory.mktemp("base")
    data = {"path": str(make_shards(folder))}
    return pretrain(from_dict(Recipe, {**TINY, "model": MODEL, "data": data}), folder / "run")


@pytest.fixture
def recipe(base, tmp_path) -> SFTRecipe:
    path = write_conversations(tmp_path / "questions.jsonl")
    return from_dict(SFTRecipe, {**TINY, "init": str(base), "data": {"path": str(path)}})


def test_answers_and_their_end_are_trained_on_and_nothing_else(recipe, base, tmp_path):
    ready, _ = with_shards(recipe, tmp_path / "cache")
    shards, tokenizer = Shards.open(ready.data.path), load_tokenizer(base / "tokenizer")
    assert ready.data.packing == "fit"
    asked = {row["messages"][1]["content"] for row in map(json.loads, open(recipe.data.path))}
    batch = Loader(shards, batch_size=4, seq_len=64, seed=0, packing="fit").batch(0)
    seen = 0
    for row in range(4):
        for document in range(batch.documents[row].max() + 1):
            inside = (batch.documents[row] == document) & batch.loss_mask[row]
            answer = tokenizer.decode(batch.targets[row][inside].tolist(), skip_special=False)
            assert answer.endswith("<|end|>") and answer.removesuffix("<|end|>") in asked
            assert np.array_equal(
                np.flatnonzero(inside), np.arange(np.flatnonzero(inside)[0], inside.nonzero()[0][-1] + 1)
            )
            seen += 1
    assert seen > 4


def test_questions_are_trained_on_too_where_that_is_asked_for(recipe, tmp_path, capfd):
    """Every token behind a real one is a target, and the sample of the mask shows it."""
    whole = replace(recipe, train_on="all", train=replace(recipe.train, steps=1))
    ready, _ = with_shards(whole, tmp_path / "all.data")
    batch = Loader(whole.trained(Shards.open(ready.data.path)), batch_size=4, seq_len=64, seed=0, packing="fit").batch(
        0
    )
    assert np.array_equal(batch.loss_mask, batch.documents >= 0) and not batch.loss_mask.all()
    for each, name in ((whole, "all"), (replace(whole, train_on="answers"), "answers")):
        sft(each, tmp_path / name)
        shown = capfd.readouterr().err
        assert ("«<|user|>" in shown) == (name == "all") == ("<|assistant|>«" not in shown)


def test_data_show_shows_all_that_a_run_trained_on(recipe, base, tmp_path, capsys):
    ready, _ = with_shards(recipe, tmp_path / "cache")
    shown = []
    for words in ([], ["--train-on", "all"]):
        assert main(["data", "show", ready.data.path, "--limit", "0", "--json", *words]) == 0
        shown.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    answers, everything = shown
    texts = ["".join(span["text"] for span in spans) for spans in answers]
    assert texts == ["".join(span["text"] for span in spans) for spans in everything]
    shards = replace(recipe, train_on="all").trained(Shards.open(ready.data.path))
    tokenizer = load_tokenizer(base / "tokenizer")
    assert everything == [document_spans(shards, i, tokenizer) for i in range(shards.documents)]
    trained = ["".join(span["text"] for span in spans if span["trained"]) for spans in everything]
    assert all(text.endswith(part) and len(part) >= len(text) - 32 for text, part in zip(texts, trained, strict=True))
    few = ["".join(span["text"] for span in spans if span["trained"]) for spans in answers]
    assert all(whole.endswith(part) and len(whole) > len(part) > 0 for whole, part in zip(trained, few, strict=True))
    made = (manifest.parent for manifest in base.parent.glob("*/manifest.json"))
    plain = next(str(path) for path in made if read_manifest(path).kind == "shards")
    assert main(["data", "show", plain, "--train-on", "all"]) == 2
    assert "holds no conversations" in capsys.readouterr().err


def test_tuning_lowers_the_answer_loss_and_knows_its_parents(recipe, base, tmp_path, capfd):
    out = sft(recipe, tmp_path / "tuned")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    manifest = open_artifact(out, "run")
    assert manifest.config["task"] == "sft" and manifest.parent("init").kind == "run"
    assert ancestor(manifest, "tokenizer").content_hash == load_tokenizer(out / "tokenizer").content_hash
    shown = capfd.readouterr().err
    assert "«" in shown and "<|end|>»" in shown  # the sample of the mask


def test_the_model_is_loaded_once(recipe, tmp_path, monkeypatch):
    calls = []
    for module in (align_start, start_module):
        monkeypatch.setattr(module, "load_model", lambda *args: calls.append(args) or load_model(*args))
    sft(recipe, tmp_path / "tuned")
    assert len(calls) == 1


def test_packing_is_done_once_and_again_for_other_data(recipe, tmp_path):
    first = with_shards(recipe, tmp_path / "cache")[0].data.path
    written = (Path(first) / "manifest.json").stat().st_mtime_ns
    assert with_shards(recipe, tmp_path / "cache")[0].data.path == first
    assert (Path(first) / "manifest.json").stat().st_mtime_ns == written
    write_conversations(Path(recipe.data.path), seed=1)
    assert with_shards(recipe, tmp_path / "cache")[0].data.path != first


def test_plain_text_without_a_mask_is_refused(recipe, base, tmp_path):
    plain = replace(recipe, data=replace(recipe.data, path=str(base.parent / "shards")))
    with pytest.raises(DataError, match="without a loss mask"):
        sft(plain, tmp_path / "tuned")
    assert not list(tmp_path.glob("tuned*"))


@pytest.mark.parametrize("trained", [0, 1])
def test_a_mask_that_says_nothing_is_refused(recipe, tmp_path, trained, monkeypatch):
    ready, _ = with_shards(recipe, tmp_path / "cache")
    real = Shards.open.__func__

    def uniform(cls, path, split="train"):
        shards = real(cls, path, split)
        return replace(shards, mask=np.full(shards.tokens, trained, dtype=np.uint8))

    monkeypatch.setattr(Shards, "open", classmethod(uniform))
    with pytest.raises(DataError, match="all zeros" if trained == 0 else "all ones"):
        sft(ready, tmp_path / "tuned")


def test_conversations_without_an_answer_are_refused(recipe, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"only a question {i}"}]} for i in range(40)]
    Path(recipe.data.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="all zeros"):
        sft(recipe, tmp_path / "tuned")


def test_a_refused_tuning_leaves_nothing_behind_but_what_was_there(recipe, tmp_path):
    wrong = replace(recipe, train=replace(recipe.train, seq_len=128))  # the model's context is shorter
    with pytest.raises(ConfigError, match="context"):
        sft(wrong, tmp_path / "tuned")
    assert not list(tmp_path.glob("tuned*"))
    sft(recipe, tmp_path / "tuned")
    packed = sorted((tmp_path / "tuned.data").iterdir())
    write_conversations(Path(recipe.data.path), seed=5)
    with pytest.raises(ArtifactError, match=r"finished run made from other parents \(.*shards-.*; now .*shards-"):
        sft(recipe, tmp_path / "tuned")
    assert sorted((tmp_path / "tuned.data").iterdir()) == packed


def test_a_model_is_needed_and_its_tokenizer_must_be_the_datas(recipe, base, tmp_path):
    with pytest.raises(UsageError, match="--init"):
        sft(replace(recipe, init=""), tmp_path / "tuned")
    other = make_shards(tmp_path / "other", seed=1, vocab_size=290)
    stranger = from_dict(Recipe, {**TINY, "init": str(base), "data": {"path": str(other)}})
    with pytest.raises(LineageError) as error:
        pretrain(stranger, tmp_path / "more")
    assert str(other) in str(error.value) and str(base) in str(error.value)
    assert not list(tmp_path.glob("more*"))


def test_the_command_line_predicts_without_writing(recipe, base, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    code = main(
        [
            "sft",
            "luban_sft_cpu",
            "--init",
            str(base),
            "--data.path",
            recipe.data.path,
            "--train.seq_len",
            "64",
            "--dry-run",
        ]
    )
    printed = capsys.readouterr().out
    assert code == 0 and all(word in printed for word in ("memory", "tokens", "FLOPs", "step", "about"))
    assert sorted(tmp_path.iterdir()) == before


TOOLS_TEMPLATE = """{{ bos_token }}{% if tools %}{{ '<|system|>' + tools | tojson + '<|end|>' }}{% endif %}{% for m in messages -%}
{% if m.role == 'tool' %}{{ '<|user|>' + m.content + '<|end|>' }}{% else %}{{ '<|' + m.role + '|>' + (m.content or '') -}}
{% for c in m.tool_calls or [] %}{{ 'call ' + c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|end|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def tool_rows(count: int) -> list[dict]:
    """Rows as OpenAI's fine-tuning takes them: arguments as JSON text, no content beside calls."""
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    return [
        {
            "tools": tools,
            "messages": [
                {"role": "user", "content": f"time in {i}?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": f"c{i}",
                            "type": "function",
                            "function": {"name": "now", "arguments": json.dumps({"zone": i})},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": f"c{i}", "content": f"{i}:00"},
                {"role": "assistant", "content": f"It is {i}."},
            ],
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuned_on(base, data: Path, **fields) -> SFTRecipe:
    return from_dict(SFTRecipe, {**TINY, "init": str(base), "data": {"path": str(data)}, **fields})


def test_tool_turns_are_tuned_on_with_a_template_that_has_them(base, tmp_path):
    data = write_rows(tmp_path / "calls.jsonl", tool_rows(30))
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    with pytest.raises(DataError, match=r"roles system, user and assistant|leaves out its tool calls"):
        with_shards(tuned_on(base, data), tmp_path / "cache")  # the built-in template has no tool turns
    recipe = tuned_on(base, data, chat_template=str(template))
    out = sft(recipe, tmp_path / "run")
    (packed,) = (tmp_path / "run.data").glob("shards-*")
    shards, tokenizer = Shards.open(packed), load_tokenizer(out / "tokenizer")
    trained = [
        [s["text"] for s in document_spans(shards, i, tokenizer) if s["trained"]] for i in range(shards.documents)
    ]
    assert len(trained) > 20
    for call, answer in trained:
        number = int(answer.removeprefix("It is ").removesuffix(".<|end|>"))
        assert call == f'call now{{"zone": {number}}}<|end|>'
    first = document_spans(shards, 0, tokenizer)[0]
    assert first["text"].startswith("<|bos|><|system|>[{") and '"name": "now"' in first["text"]
    # the template's identity is in the lineage, and the vocabulary is still the base's
    used = ancestor(open_artifact(out, "run"), "tokenizer")
    assert used.content_hash == tokenizer.content_hash == open_artifact(out / "tokenizer", "tokenizer").content_hash
    assert used.content_hash != load_tokenizer(base / "tokenizer").content_hash
    assert tokenizer.chat_template == TOOLS_TEMPLATE and load_model(out).tokenizer.chat_template == TOOLS_TEMPLATE
    assert [p.content_hash for p in used.parents] == [load_tokenizer(base / "tokenizer").content_hash]
    # a run that starts from this one needs no option
    again, _ = with_shards(tuned_on(out, data), tmp_path / "again")
    assert load_tokenizer(Path(again.data.path) / "tokenizer").content_hash == used.content_hash


def test_a_template_and_shards_that_are_packed_already_are_refused(recipe, tmp_path):
    ready, _ = with_shards(recipe, tmp_path / "cache")
    (tmp_path / "t.jinja").write_text(TOOLS_TEMPLATE)
    with pytest.raises(UsageError, match="packed already"):
        with_shards(replace(ready, chat_template=str(tmp_path / "t.jinja")), tmp_path / "cache")
    for text, words in (("{% for m in %}", "not valid Jinja"), (None, "can't be read")):
        file = tmp_path / "bad.jinja"
        file.unlink(missing_ok=True) if text is None else file.write_text(text)
        with pytest.raises(DataError, match=words):
            with_shards(replace(recipe, chat_template=str(file)), tmp_path / "cache")


def test_what_is_left_out_of_a_jsonl_is_said(recipe, tmp_path, capsys):
    """Conversations are the same where every turn is: role, words, calls."""
    row = {"role": "user", "content": "same"}
    same = {"messages": [row, {"role": "assistant", "content": "words"}]}
    other = {
        "messages": [
            {**row, "role": "system"},
            {"role": "user", "content": "words"},
            {"role": "assistant", "content": ""},
        ]
    }
    rows = [{"messages": [{**row, "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(200)]
    write_rows(Path(recipe.data.path), [same, other, *rows, same, same])
    with open(recipe.data.path, "a") as file:
        file.write("rubbish\n")
    with_shards(recipe, tmp_path / "cache")
    said = capsys.readouterr().err
    assert (
        "2 of 204 conversations repeat an earlier one" in said and "questions.jsonl#" in said and "--steps ''" in said
    )
    assert "1 invalid JSON lines are left out, such as questions.jsonl at byte" in said
    counted = re.search(r"(\d+) conversations to train on, (\d+) held out for validation\n", said)
    assert sum(map(int, counted.groups())) == 202
    with_shards(recipe, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "repeat" not in said and counted.group() in said  # nothing is built again


def test_conversations_without_an_answer_are_counted_each_time(recipe, tmp_path, capsys):
    with open(recipe.data.path, "a") as file:
        file.writelines(json.dumps({"messages": [{"role": "user", "content": f"only {i}"}]}) + "\n" for i in range(7))
    for _ in range(2):
        with_shards(recipe, tmp_path / "cache")
        assert ", 7 left out, which have no assistant text\n" in capsys.readouterr().err


def test_too_many_unusable_rows_name_the_command_that_takes_the_option(recipe, tmp_path):
    rows = tool_rows(10)
    write_rows(Path(recipe.data.path), rows + [{"messages": [{"role": "user", "content": None}]}] * 5)
    with pytest.raises(DataError, match=r"(?s)5 rows with unusable messages.*luban corpus build --bad-share"):
        with_shards(recipe, tmp_path / "cache")

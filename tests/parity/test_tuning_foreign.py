"""Every MODEL that `chat` takes is tuned, measured and exported, by the template that it came with."""

from __future__ import annotations

import json
import random

import pytest

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from test_gguf import write

import luban
import luban.load.model
from luban.checkpoint.weights import weights_hash
from luban.cli.main import main
from luban.core.artifact import open_artifact
from luban.load.export import import_model

TEMPLATE = "{% for m in messages %}{{ m.role + '!' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}assistant!{% endif %}"
SMALL = [
    "--train.steps",
    "2",
    "--train.batch_size",
    "4",
    "--train.seq_len",
    "48",
    "--train.compile",
    "false",
    "--train.precision",
    "fp32",
    "--validation.batches",
    "1",
    "--checkpoint.every",
    "2",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model as a GGUF file, a checkpoint of ours, a Hugging Face directory and a name."""
    folder = tmp_path_factory.mktemp("models")
    file = write(folder / "model.gguf", quant="F32", template=TEMPLATE)
    loaded = luban.load_model(file)
    luban.export_model(loaded, folder / "hf")
    return {"gguf": file, "checkpoint": import_model(loaded, folder / "ours"), "hf": folder / "hf", "name": "smollm2"}


@pytest.mark.parametrize("kind", ["gguf", "hf", "name"])
def test_a_foreign_model_is_inspected(kind, models, monkeypatch, capsys):
    monkeypatch.setattr(luban.load.model, "packaged_file", lambda name: models["gguf"])
    model = luban.load_model(models[kind])
    assert main(["inspect", str(models[kind]), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["parameters"] == sum(p.numel() for p in model.module.parameters()) and known["context"] == 64
    assert known["weights_hash"] == weights_hash(dict(model.module.named_parameters()))
    assert known["tokenizer"]["stop"] == ["<|end|>"] and known["tokenizer"]["chat_template"]
    assert main(["inspect", str(models[kind])]) == 0
    shown = capsys.readouterr().out
    assert known["weights_hash"] in shown and "<|end|>" in shown and f"{known['parameters']:,}" in shown
    assert main(["inspect", str(models[kind]), "--verify"]) == 2
    assert "luban import" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [True, False])
def test_a_tuned_gguf_model_begins_its_texts_as_the_file_does(begin, tmp_path):
    file = write(tmp_path / "model.gguf", quant="F32", template=TEMPLATE, begin=begin)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    words = [
        "sft",
        "luban_sft_cpu",
        "--init",
        file,
        "--data.path",
        tmp_path / "chat.jsonl",
        *SMALL,
        "--out",
        tmp_path / "run",
    ]
    assert main(list(map(str, words))) == 0
    luban.export_model(luban.load_model(tmp_path / "run"), tmp_path / "hf")
    for model in (luban.load_model(path) for path in (file, tmp_path / "run", tmp_path / "hf")):
        assert model.begins_with_bos == begin
        assert luban.Engine(model).tokens_of("a") == [*[model.tokenizer.bos_id] * begin, *model.tokenizer.encode("a")]


@pytest.mark.parametrize("kind", ["gguf", "checkpoint", "hf", "name"])
def test_a_foreign_model_is_tuned_shown_measured_and_exported(kind, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(luban.load.model, "packaged_file", lambda name: models["gguf"])
    draw = random.Random(1)
    rows = [
        [
            {"role": role, "content": "".join(draw.choices("abcd?", k=draw.randint(1, 6)))}
            for role in ("user", "assistant", "user", "assistant")
        ]
        for _ in range(60)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    out, model = tmp_path / "run", str(models[kind])

    def luban_(*words) -> str:
        assert main(list(map(str, words))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    luban_("sft", "luban_sft_cpu", "--init", model, "--data.path", data, *SMALL, "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl"]  # nothing is packed into the run's place
    luban_("sft", "luban_sft_cpu", "--init", model, "--data.path", data, *SMALL, "--out", out)
    (shards,) = (tmp_path / "run.data").glob("shards-*")
    shown = [json.loads(line) for line in luban_("data", "show", shards, "--limit", 0, "--json").splitlines()]
    want = {tuple(m["content"] + "<|end|>" for m in row if m["role"] == "assistant") for row in rows}
    assert len(shown) > 50 and {tuple(s["text"] for s in spans if s["trained"]) for spans in shown} <= want
    tuned, before = luban.load_model(out), luban.load_model(model)
    assert tuned.tokenizer.same_vocabulary(before.tokenizer) and tuned.tokenizer.chat_template == TEMPLATE
    assert tuned.tokenizer.stop_ids == before.tokenizer.stop_ids
    assert open_artifact(out, "run").settings["init"] == model
    luban_("corpus", "build", data, "--heldout", "0.2", "--out", tmp_path / "corpus")
    assert "answer_loss" in luban_(
        "eval", model, "answer_loss", "--corpus", tmp_path / "corpus", "--out", tmp_path / "e"
    )
    luban_("export", model, "--out", tmp_path / "exported")
    luban_("export", out, "--out", tmp_path / "tuned")
    assert luban.load_model(tmp_path / "tuned").tokenizer.chat_template == TEMPLATE

"""Loading: what each kind of path gives, and an error that names the file or tensor for all that can be wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import luban
from luban.core.artifact import ArtifactWriter, as_parent, open_artifact
from luban.core.errors import ArtifactError, ConfigError, DataError, LineageError, UnsupportedError
from luban.core.whole_directory import incomplete_path
from luban.load.export import import_model
from luban.models.arrangement.post import PostNorm
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes, Value
from luban.models.head.tokens import TokenClasses
from luban.models.spec import changed, uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned
from luban.tokenizer.tokenizer import Tokenizer

TOKENS = torch.arange(20).reshape(2, 10)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def foreign(tiny_checkpoint, tmp_path):
    return luban.export_model(luban.load_model(tiny_checkpoint), tmp_path / "foreign")


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_checkpoint_and_its_precisions(checkpoint):
    m = luban.load_model(checkpoint)
    assert m.tokenizer.decode(m.tokenizer.encode("hé")) == "hé" and m.begins_with_bos
    assert set(m.stop_ids) == {1, 6}  # end of text, end of turn
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in m.module.named_parameters())
    assert luban.load_model(checkpoint, dtype="bfloat16").module.decoder.embedding.tokens.weight.dtype == torch.bfloat16


def make_run(tmp_path, checkpoint, *, finished=True, figures=None):
    """A run of two checkpoints, the second being `checkpoint`, made with a tokenizer artifact."""
    with ArtifactWriter(tmp_path / "tokenizer", kind="tokenizer") as art:
        shutil.copytree(checkpoint / "tokenizer", art.path, dirs_exist_ok=True)
    with ArtifactWriter(tmp_path / "shards", kind="shards", parents=(as_parent("tokenizer", tmp_path / "tokenizer"),)):
        pass
    writer = ArtifactWriter(
        tmp_path / "run", kind="run", parents=(as_parent("shards", tmp_path / "shards"),), resumable=True
    )
    try:
        with writer as run:
            shutil.copytree(tmp_path / "tokenizer", run.path / "tokenizer")
            for step in (9, 10):
                with ArtifactWriter(run.path / "checkpoints" / f"step_{step:06d}", kind="checkpoint") as part:
                    shutil.copyfile(checkpoint / "spec.json", part.path / "spec.json")
                    tensors = load_file(checkpoint / "model.safetensors")
                    save_file({k: v * (step == 10) for k, v in tensors.items()}, part.path / "model.safetensors")
            run.figures.update(figures or {})
            if not finished:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return tmp_path / "run"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_gives_its_last_checkpoint(tmp_path, checkpoint, finished, capsys):
    """Of an unfinished one that is said."""
    run = make_run(tmp_path, checkpoint, finished=finished)
    assert incomplete_path(run).exists() != finished
    m = luban.load_model(run)
    said = f"warning: {run}.incomplete is an unfinished run: its last checkpoint so far, step_000010, is used\n"
    assert capsys.readouterr().err == ("" if finished else said)
    assert m.name == "run" and m.manifest.kind == "run" and m.path.name == "step_000010"
    assert torch.equal(m.module(TOKENS), luban.load_model(checkpoint).module(TOKENS))
    direct = luban.load_model(m.path)
    assert direct.tokenizer is not None  # found in the run around it


def test_an_unfinished_run_without_a_checkpoint_is_no_path_that_is_not_there(tmp_path, checkpoint):
    run = make_run(tmp_path, checkpoint, finished=False)
    shutil.rmtree(incomplete_path(run) / "checkpoints")
    with pytest.raises(ArtifactError, match=r"run is unfinished \(.*run.incomplete\), and has no checkpoint yet"):
        luban.load_model(run)


@pytest.mark.parametrize("finished", [True, False])
def test_a_finished_run_gives_its_best_checkpoint(tmp_path, checkpoint, finished):
    named = {"checkpoints": {"best": "step_000009", "last": "step_000010"}}
    run = make_run(tmp_path, checkpoint, finished=finished, figures=named)
    assert luban.load_model(run).path.name == ("step_000009" if finished else "step_000010")
    assert luban.load_model(run / "checkpoints" / "step_000010").path.name == "step_000010" if finished else True


def test_a_run_with_another_tokenizer_is_refused(tmp_path, checkpoint):
    run = make_run(tmp_path, checkpoint)
    shutil.rmtree(run / "tokenizer")
    with ArtifactWriter(run / "tokenizer", kind="tokenizer", config={"another": 1}) as art:
        shutil.copytree(checkpoint / "tokenizer", art.path, dirs_exist_ok=True)
    with pytest.raises(LineageError, match="were made with different tokenizers"):
        luban.load_model(run)


def test_an_edited_checkpoint_is_refused(tmp_path, checkpoint):
    run = make_run(tmp_path, checkpoint)
    file = run / "checkpoints" / "step_000010" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"content of model\.safetensors does not match"):
        luban.load_model(run)


def test_round_trip_through_the_hugging_face_layout(checkpoint, foreign, tmp_path):
    m, back = luban.load_model(checkpoint), luban.load_model(foreign)
    assert torch.equal(m.module(TOKENS), back.module(TOKENS)) and back.begins_with_bos
    assert set(back.stop_ids) == set(m.stop_ids) and back.tokenizer.chat_template == m.tokenizer.chat_template
    import_model(back, tmp_path / "imported")
    open_artifact(tmp_path / "imported", "checkpoint")
    again = luban.load_model(tmp_path / "imported")
    assert torch.equal(m.module(TOKENS), again.module(TOKENS))
    assert again.tokenizer.encode("x") == m.tokenizer.encode("x")
    with pytest.raises(ArtifactError, match="already exists"):
        luban.export_model(m, foreign)


def test_shards_and_directories_without_tokenizer(foreign):
    tensors = load_file(foreign / "model.safetensors")
    (foreign / "model.safetensors").unlink()
    (foreign / "tokenizer.json").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, foreign / file)
    where = {name: file for file, chosen in parts.items() for name in chosen}
    index = foreign / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    m = luban.load_model(foreign)
    assert m.tokenizer is None and m.module(TOKENS).isfinite().all()
    with pytest.raises(DataError, match="holds no tokenizer"):
        luban.Engine(m).generate("text")
    index.write_text(json.dumps({"weight_map": {**where, names[0]: "c.safetensors"}}))
    with pytest.raises(ArtifactError, match=r"names the shard c\.safetensors"):
        luban.load_model(foreign)
    index.write_text(json.dumps({"weight_map": {**where, "phantom": "a.safetensors"}}))
    with pytest.raises(ArtifactError, match="lacks the tensor phantom"):
        luban.load_model(foreign)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "no place for: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"model\.norm\.weight .*has shape \(5,\), .* needs \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            r"model\.norm\.weight is stored as int8",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e5m2)}),
            "stored as float8_e5m2: quantised",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(foreign, change, message):
    rewrite(foreign / "model.safetensors", change)
    with pytest.raises(ArtifactError, match=message):
        luban.load_model(foreign)


def test_truncated_pickled_and_unknown(foreign, tmp_path):
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(UnsupportedError, match=r"unknown architecture 'lama'.*did you mean 'llama'"):
        luban.load_model(foreign)
    (foreign / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(ArtifactError, match="lacks 'hidden_size'"):
        luban.load_model(foreign)
    (foreign / "config.json").write_text(json.dumps(config))
    weights = foreign / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="truncated"):
        luban.load_model(foreign)
    weights.rename(foreign / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"is a pickle.*never loaded.*save_pretrained"):
        luban.load_model(foreign)
    with pytest.raises(ArtifactError, match="is a pickle"):
        luban.load_model(foreign / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="does not exist"):
        luban.load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"spec\.json or config\.json"):
        luban.load_model(tmp_path / "empty")


@pytest.fixture(params=["trained here", "from a GGUF file"])
def beginning(request, checkpoint):
    """A model whose texts begin with the begin token, though no file of its tokenizer says so."""
    folder = checkpoint / "tokenizer"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if request.param == "trained here":
        files = shutil.move(folder, checkpoint / "files")
        with ArtifactWriter(folder, kind="tokenizer") as art:
            shutil.copytree(files, art.path, dirs_exist_ok=True)
        return luban.load_model(checkpoint)
    m = luban.load_model(checkpoint)
    return replace(m, tokenizer=Tokenizer(m.tokenizer._model, m.tokenizer.settings), begins_with_bos=True)


def test_the_begin_token_is_not_lost_on_the_way(beginning, tmp_path):
    assert beginning.begins_with_bos
    prompt = luban.Engine(beginning).tokens_of("hé")
    luban.export_model(beginning, tmp_path / "hf")
    import_model(beginning, tmp_path / "imported")
    for folder in ("hf", "imported"):
        assert luban.Engine(luban.load_model(tmp_path / folder)).tokens_of("hé") == prompt
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("hé").input_ids == prompt and theirs("hé", "!").input_ids == [
        *prompt,
        *luban.Engine(beginning).tokens_of("!"),
    ]


def test_sources_of_an_encoder_decoder_keep_their_end_token(checkpoint, tmp_path):
    files = Path(shutil.move(checkpoint / "tokenizer", checkpoint / "files"))
    settings = json.loads((files / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    del settings["add_bos_token"]
    (files / "tokenizer_config.json").write_text(json.dumps(settings))  # else theirs takes BART's own
    with ArtifactWriter(checkpoint / "tokenizer", kind="tokenizer") as art:
        shutil.copytree(files, art.path, dirs_exist_ok=True)
    bart = {
        "position": Learned(offset=2),
        "norm": LayerNorm(),
        "embedding_norm": LayerNorm(),
        "arrangement": PostNorm(),
        "mixer": Grouped(heads=4, qkv_bias=True, output_bias=True),
        "feedforward": GELU(width=48, bias=True),
    }
    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=64,
        tied_head=True,
        head=LanguageModel(bias=True),
        body=EncoderDecoderBody(decoder_start=1),
        **bart,
    )
    m = luban.load_model(checkpoint)
    m = replace(m, spec=spec, module=luban.build_model(spec))
    prompt = luban.Engine(m).tokens_of("hé")
    assert prompt[0] == m.tokenizer.bos_id and prompt[-1] == m.tokenizer.eos_id
    luban.export_model(m, tmp_path / "hf")
    assert luban.Engine(luban.load_model(tmp_path / "hf")).tokens_of("hé") == prompt
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("hé").input_ids == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "says hidden_size = '32': a whole number is needed"),
        ({"num_hidden_layers": True}, "says num_hidden_layers = True: a whole number is needed"),
        ({"num_key_value_heads": 2.0}, r"says num_key_value_heads = 2\.0: a whole number is needed"),
        ({"rms_norm_eps": "1e-5"}, "says rms_norm_eps = '1e-5': a number is needed"),
        ({"tie_word_embeddings": "yes"}, "says tie_word_embeddings = 'yes': true or false is needed"),
        ({"architectures": "LlamaForCausalLM"}, "says architectures = 'LlamaForCausalLM': a list is needed"),
        ({"rope_parameters": [1]}, r"says rope_parameters = \[1\]: a table is needed"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"lacks 'rope_parameters\.factor'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "llama3", "factor": 8.0}},
            r"lacks 'rope_scaling\.low_freq_factor'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": "4"}},
            r"rope_parameters\.factor = '4': a number is needed",
        ),
        ({"model_type": ["llama"]}, "names no model_type"),
    ],
)
def test_fields_that_cannot_be_are_named(foreign, changes, message):
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ArtifactError, match=message):
        luban.load_model(foreign)


def test_directories_of_other_shapes_say_what_is_there(foreign):
    config = json.loads((foreign / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (foreign / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedError, match=r"quantised \(gptq\), which isn't read"):
        luban.load_model(foreign)
    (foreign / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json holds no table"):
        luban.load_model(foreign)
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "tokenizer.json").rename(foreign / "vocab.json")
    with pytest.raises(
        DataError, match=r"its vocab\.json alone does not say .* 'llama' .*AutoTokenizer makes a tokenizer\.json"
    ):
        luban.load_model(foreign).need_tokenizer()
    for weight_map in ([], {"a": 3}, None):
        (foreign / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
            luban.load_model(foreign)
    (foreign / "model.safetensors.index.json").unlink()
    for name, way in (
        ("model-00001-of-00001.safetensors", "one file is called"),
        ("model.gguf", "load that file itself"),
    ):
        next(f for f in foreign.iterdir() if f.suffix in (".safetensors", ".gguf")).rename(foreign / name)
        with pytest.raises(ArtifactError, match=f"holds no model.safetensors, but {name}: {way}"):
            luban.load_model(foreign)


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (Classes(count=3, pooling="last", dense=False, bias=False), ("bad", "so so", "good")),
        (TokenClasses(count=2), ("name", "other")),
        (Value(bias=False), ("helpfulness",)),
    ],
    ids=["rows", "tokens", "reward"],
)
def test_names_of_classes_survive_import_and_export(checkpoint, tmp_path, head, named):
    m = luban.load_model(checkpoint)
    spec = changed(m.spec, head=head)
    luban.export_model(replace(m, spec=spec, module=luban.build_model(spec)), tmp_path / "plain")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    names = {str(i): name for i, name in enumerate(named)}
    (tmp_path / "plain/config.json").write_text(json.dumps({**config, "id2label": names}))
    first = luban.load_model(tmp_path / "plain")
    import_model(first, tmp_path / "imported")
    luban.export_model(luban.load_model(tmp_path / "imported"), tmp_path / "again")
    assert first.labels == luban.load_model(tmp_path / "again").labels == named
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["id2label"] == names and again["label2id"] == {name: i for i, name in enumerate(named)}


def test_values_too_large_for_the_precision_are_refused_by_name(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "decoder.norm.weight"
    save_file({**tensors, name: tensors[name] + 70_000}, file)
    with pytest.raises(UnsupportedError, match=rf"{name} has values up to 7000\d.*float16 holds 65504 at most"):
        luban.load_model(tmp_path / "m", dtype="float16")
    for dtype in ("float32", "bfloat16"):
        luban.load_model(tmp_path / "m", dtype=dtype)


def test_an_unknown_precision_names_all_that_there_are(tiny_checkpoint):
    with pytest.raises(ConfigError, match=r"unknown precision 'int3' \(did you mean 'int8'\?\)"):
        luban.load_model(tiny_checkpoint, dtype="int3")
    with pytest.raises(ConfigError, match="known: bfloat16, float16, float32, float64, fp8, int8"):
        luban.load_model(tiny_checkpoint, dtype="x")

"""What an exported directory says, and why a model can't be exported."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import luban
from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.saver import save_checkpoint
from luban.cli.main import main
from luban.core.artifact import Manifest, Parent
from luban.core.errors import ArtifactError, ConfigError, LineageError, UnsupportedError
from luban.load import export
from luban.load.export import export_model, import_model
from luban.load.model import load_model, open_model
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.pre import PreNorm
from luban.models.arrangement.sandwich import SandwichNorm
from luban.models.build import state_of
from luban.models.convert.base import find_format, format_for
from luban.models.decoder import DecoderBody
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.head.masked_lm import MaskedLM
from luban.models.head.rows import Classes, Value
from luban.models.presets import preset
from luban.models.spec import spec_to_dict, uniform
from luban.nn.feedforward.gated import GEGLU, SwiGLU, TanhGEGLU
from luban.nn.feedforward.plain import GELU, ReLU, TanhGELU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.kerple import KerpleLog
from luban.nn.position.learned import Learned
from luban.nn.position.rope import Rope
from luban.nn.position.t5 import RelativeBias

SMALL = {"vocab_size": 40, "width": 32, "layers": 2, "mixer": Grouped(heads=4), "feedforward": SwiGLU(width=48)}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"position": KerpleLog()}, "its position is kerple_log instead of rope, as a llama has"),
        ({"feedforward": GEGLU(width=48)}, "its feedforward is geglu instead of swiglu, as a llama has"),
        (
            {"mixer": Grouped(heads=4, score_scale=0.3)},
            "its mixer has score_scale = 0.3 instead of None, as a llama has",
        ),
        ({"arrangement": SandwichNorm()}, "its arrangement is sandwich instead of pre, as a llama has"),
        ({"embedding_norm": LayerNorm()}, "its embedding_norm is layernorm instead of None, as a llama has"),
        ({"head": LanguageModel(bias=True)}, "its head has bias = True instead of False, as a llama has"),
        ({"position": Rope(pairing="interleaved")}, "its position has pairing = interleaved instead of half"),
        (
            {"position": KerpleLog(), "feedforward": GEGLU(width=48)},
            "its position is kerple_log instead of rope and its feedforward is geglu instead of swiglu, as a llama has",
        ),
    ],
)
def test_the_parts_without_a_counterpart_are_named(changes, why):
    with pytest.raises(UnsupportedError, match=f"no Hugging Face architecture expresses this model: {why}"):
        format_for(uniform(**{**SMALL, **changes}))


def test_layers_that_differ_are_named():
    spec = uniform(**SMALL)
    spec = replace(spec, layers=(spec.layers[0], replace(spec.layers[0], feedforward=SwiGLU(width=50))))
    with pytest.raises(UnsupportedError, match="its layers differ instead of being alike, as a llama has"):
        format_for(spec)


def test_bodies_that_are_not_made_of_layers_are_named():
    with pytest.raises(UnsupportedError, match="its body, elmo, is not made of Transformer layers"):
        format_for(preset("elmo"))


@pytest.mark.parametrize(("length", "expected"), [(None, 64), (10**30, 64), (17, 17)])
def test_the_context_is_the_tokenizers_length_unless_it_names_another(tiny_checkpoint, tmp_path, length, expected):
    m = luban.load_model(tiny_checkpoint)
    first = luban.export_model(replace(m, spec=replace(m.spec, context=64)), tmp_path / "first")
    file = first / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("model_max_length") == 64
    file.write_text(json.dumps(settings | ({} if length is None else {"model_max_length": length})))
    again = luban.export_model(luban.load_model(first), tmp_path / "again")
    assert json.loads((again / "tokenizer_config.json").read_text())["model_max_length"] == expected
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(again).model_max_length == expected


@pytest.mark.parametrize("writes", [True, False])
def test_an_export_says_how_to_tokenise_a_filled_template(tiny_checkpoint, tmp_path, capsys, writes):
    shutil.copytree(tiny_checkpoint, tmp_path / "m")
    template = tmp_path / "m" / "tokenizer" / "chat_template.jinja"
    begin = "<|bos|>" if writes else ""  # spelled out, as some published templates do
    template.write_text(begin + "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}")
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "hf")]) == 0
    assert ("tokenizer(text, add_special_tokens=False)" in "".join(capsys.readouterr())) == writes
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "hi"}]
    ids = theirs.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert ids == theirs(theirs.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
    assert ids.count(theirs.bos_token_id) == writes


GPT = {"arrangement": PreNorm(), "norm": LayerNorm(), "feedforward": TanhGELU(width=64, bias=True)}
BIASED = Grouped(heads=2, qkv_bias=True, output_bias=True)
BASES = (  # a model of each kind of format
    {},
    {"mixer": Grouped(heads=2, head_dim=8, qk_norm=RMSNorm())},
    {"mixer": Grouped(heads=2, qkv_bias=True)},
    {**GPT, "mixer": replace(BIASED, kv_heads=2), "position": Learned()},
    {**GPT, "mixer": replace(BIASED, kv_heads=2), "position": Learned(), "arrangement": PostNorm()},
    {**GPT, "mixer": replace(BIASED, kv_heads=2), "position": Alibi(), "embedding_norm": LayerNorm()},
    {**GPT, "mixer": Grouped(heads=2), "feedforward": GELU(width=64), "arrangement": Parallel(norms=1)},
    {**GPT, "mixer": BIASED, "arrangement": Parallel(norms=1), "head": LanguageModel(bias=True)},
    {
        **GPT,
        "mixer": BIASED,
        "arrangement": PostNorm(),
        "embedding_norm": LayerNorm(),
        "position": Learned(),
        "body": EncoderBody(segments=2),
        "head": MaskedLM(),
        "tied_head": True,
    },
    {
        "mixer": Grouped(heads=2, head_dim=8, score_scale=1.0),
        "position": RelativeBias(),
        "feedforward": ReLU(width=64),
        "body": EncoderDecoderBody(decoder_start=0),
        "arrangement": PreNorm(),
        "norm": RMSNorm(),
    },
    {"feedforward": TanhGEGLU(width=64), "head": LanguageModel(scale_hidden=True), "tied_head": True},
    {
        "feedforward": TanhGEGLU(width=64),
        "head": LanguageModel(scale_hidden=True),
        "arrangement": SandwichNorm(),
        "mixer": Grouped(heads=2, head_dim=8, qk_norm=RMSNorm()),
        "tied_head": True,
    },
)
HEADS = (
    LanguageModel(),
    LanguageModel(bias=True),
    LanguageModel(scale_hidden=True),
    MaskedLM(),
    Classes(count=3),
    Value(),
)
FEEDFORWARDS = (SwiGLU, GEGLU, TanhGEGLU, GELU, TanhGELU, ReLU)
OTHERS = {
    "position": (
        Rope(),
        Rope(width=4),
        Rope(pairing="interleaved"),
        Learned(),
        Learned(offset=2),
        Alibi(),
        RelativeBias(),
    ),
    "norm": (RMSNorm(), RMSNorm(eps=1e-6), LayerNorm(), LayerNorm(bias=False), LayerNorm(eps=1e-12)),
    "arrangement": (PreNorm(), PostNorm(), Parallel(norms=1), Parallel(norms=2), SandwichNorm()),
    "feedforward": tuple(kind(width=w, bias=b) for kind in FEEDFORWARDS for w in (48, 64) for b in (False, True)),
    "embedding_norm": (None, LayerNorm(), RMSNorm()),
    "head": HEADS,
    "tied_head": (False, True),
    "body": (DecoderBody(), EncoderBody(), EncoderBody(segments=2), EncoderBody(segments=2, embeddings=8)),
    "kv_heads": (None, 1, 2),
    "head_dim": (None, 8, 6),
    "window": (None, 5),
    "qkv_bias": (False, True),
    "output_bias": (False, True),
    "score_scale": (None, 1.0, 0.3),
    "qk_norm": (None, RMSNorm(), RMSNorm(eps=1e-6), LayerNorm()),
}


def drawn(rng: random.Random):
    """A model of a format with up to two of its parts changed."""
    fields = {"mixer": Grouped(heads=2), "feedforward": SwiGLU(width=64), **rng.choice(BASES)}
    for name in rng.sample(sorted(OTHERS), rng.choice([0, 1, 1, 2])):
        value = rng.choice(OTHERS[name])
        if name in ("kv_heads", "head_dim", "window", "qkv_bias", "output_bias", "score_scale", "qk_norm"):
            fields["mixer"] = replace(fields["mixer"], **{name: value})
        else:
            fields[name] = value
    return uniform(vocab_size=50, width=16, layers=2, context=40, **fields)


def same(spec):
    """The specification with what formats always write out written out."""

    def layer(item):
        mixer = replace(item.mixer, kv_heads=item.mixer.key_heads(), head_dim=item.mixer.head_width(spec.width))
        scale = None if mixer.score_scale == mixer.head_dim**-0.5 else mixer.score_scale
        return replace(item, mixer=replace(mixer, score_scale=scale))

    position = spec.position
    if isinstance(position, Rope) and position.width == spec.layers[0].mixer.head_width(spec.width):
        position = replace(position, width=None)
    layers = {name: tuple(map(layer, getattr(spec, name))) for name in ("layers", "encoder")}
    tied = spec.tied_head and isinstance(spec.head, (LanguageModel, MaskedLM))  # other heads have no table to tie
    return replace(spec, init=NormalInit(), position=position, tied_head=tied, **layers)


def test_what_a_format_accepts_it_says_whole():
    """Random specifications: either none expresses one, or its configuration is read as the same again."""
    rng, expressed = random.Random(), set()
    for _ in range(1500):
        try:
            spec = drawn(rng)
        except ConfigError:
            continue
        found = find_format(spec)
        if found is not None:
            form, config = found
            expressed.add(config["model_type"])
            assert same(form.spec(config)) == same(spec), spec
    assert len(expressed) > 9, expressed


def test_a_checkpoint_is_exported_file_by_file_from_the_disk(tiny_checkpoint, tmp_path, monkeypatch):
    whole = load_model(tiny_checkpoint)
    weights = state_of(whole.module)
    saved = tmp_path / "saved"
    save_checkpoint(saved, Checkpoint(spec=spec_to_dict(whole.spec), model=weights))
    held = open_model(saved)
    assert held.stored is not None and all(p.is_meta for p in held.module.parameters())
    assert open_model(tiny_checkpoint).stored is None  # without an index it is loaded
    right = load_file(export_model(load_model(saved), tmp_path / "one") / "model.safetensors")
    monkeypatch.setattr(export, "FILE_BYTES", 20_000)
    folder = export_model(held, tmp_path / "several")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    for file in files:
        assert len(load_file(file)) == 1 or file.stat().st_size < 22_000
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    again = state_of(load_model(folder).module)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("value", "error"), [(float("nan"), ArtifactError), (1e30, UnsupportedError)])
def test_what_cannot_be_written_is_refused_on_the_way(tiny_checkpoint, tmp_path, value, error):
    whole = load_model(tiny_checkpoint)
    weights = {name: tensor.clone() for name, tensor in state_of(whole.module).items()}
    name = sorted(weights)[-1]
    weights[name][(0,) * weights[name].dim()] = value
    save_checkpoint(tmp_path / "saved", Checkpoint(spec=spec_to_dict(whole.spec), model=weights))
    with pytest.raises(error, match=name):
        export_model(open_model(tmp_path / "saved", "float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_an_export_that_a_licence_forbids_is_refused(tiny_checkpoint, tmp_path):
    m = luban.load_model(tiny_checkpoint)
    books = Parent(role="corpus", kind="corpus", content_hash="0", name="books", terms=("research-only",))
    bound = replace(m, manifest=Manifest(kind="run", parents=(books,)))
    with pytest.raises(LineageError, match="the corpus books, which it was made from, is under research-only"):
        luban.export_model(bound, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_that_is_not_finite_is_not_written(tiny_checkpoint, tmp_path, value):
    m = luban.load_model(tiny_checkpoint)
    with torch.no_grad():
        m.module.decoder.norm.weight[3] = value
    for write in (luban.export_model, import_model):
        with pytest.raises(ArtifactError, match=r"decoder\.norm\.weight holds NaN or infinity"):
            write(m, tmp_path / "out")
    assert not list(tmp_path.iterdir())

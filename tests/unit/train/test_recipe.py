"""Recipes: what ships is valid, what is wrong is named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import luban.recipes
from luban.align.dpo import DPORecipe
from luban.align.reward import RewardRecipe
from luban.align.rl import RLRecipe
from luban.align.sft import SFTRecipe
from luban.core import log
from luban.core.arguments import describe_fields
from luban.core.config import from_dict, load_toml, merge, override, to_dict, to_toml
from luban.core.errors import ConfigError
from luban.models.config import resolve_spec
from luban.models.describe import describe
from luban.retrieval.rag.train import RagRecipe
from luban.retrieval.training.cross import RerankerRecipe
from luban.retrieval.training.train import EncoderRecipe
from luban.train.recipe import Recipe

KINDS = {
    "sft": SFTRecipe,
    "reward": RewardRecipe,
    "dpo": DPORecipe,
    "rl": RLRecipe,
    "dpr": EncoderRecipe,
    "reranker": RerankerRecipe,
    "rag": RagRecipe,
}
SHIPPED = sorted(Path(luban.recipes.__file__).parent.glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_survives_being_written_down(path):
    kind = next((kind for verb, kind in KINDS.items() if f"_{verb}_" in path.stem), Recipe)
    data = load_toml(path)
    recipe = from_dict(kind, data | ({"init": "runs/base"} if "adapter" in data else {}))
    assert from_dict(kind, tomllib.loads(to_toml(to_dict(recipe)))) == recipe
    if hasattr(recipe, "train") and recipe.model.given.keys() - {"head"}:
        assert resolve_spec(recipe.model.given, 4096).context >= recipe.train.seq_len


def test_the_tiny_recipe_takes_any_vocabulary_and_stays_tiny():
    recipe = from_dict(Recipe, load_toml(next(p for p in SHIPPED if p.stem == "tiny_pretrain_cpu")))
    for vocabulary in (300, 4096):
        spec = resolve_spec(recipe.model.given, vocabulary)
        assert spec.vocab_size == vocabulary and describe(spec).parameters < 1_000_000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.stpes", "3", "did you mean 'steps'"),
        ("train.recompute", "true", "it is now plan.remat"),
        ("train.steps", "many", "a whole number is needed"),
        ("train.steps", "0", "at least 1"),
        ("train.precision", "fp4", "fp64, fp32, bf16, fp16, fp8"),
        ("train.accumulate", "3", "not a multiple"),
        ("optim.type", "adam", "adamw"),
        ("checkpoint.keep", "0", "at least 1"),
        ("data.packing", "tight", "stream"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(field, value, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, override({"train": {"batch_size": 8}}, [(field, value)]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "luban-6n"}, "luban-6m"),
        ({"encoder": {"layer": {"mixer": {"window": 8}}}}, "model.encoder is of encoder–decoders"),
        ({"widht": 64}, "did you mean 'width'"),
        ({"vocab_size": 17}, "17"),
    ],
)
def test_a_wrong_model_is_named(model, message):
    with pytest.raises(ConfigError, match=message):
        resolve_spec(model, 4096)


def test_a_shipped_recipe_keeps_its_warm_up_and_decay_under_another_schedule_and_optimizer(capsys, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    path = next(p for p in SHIPPED if p.stem == "luban_sft_cpu")  # cosine to 0.05, AdamW without decay
    recipe = from_dict(Recipe, override(load_toml(path), [("schedule.type", "wsd"), ("optim.type", "muon")]))
    assert (recipe.schedule.warmup, recipe.schedule.final) == (10, 0.05)
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (1e-3, 0.0)
    assert from_dict(Recipe, override(load_toml(path), [("schedule.type", "constant")])).schedule.warmup == 10
    said = capsys.readouterr().err
    assert "schedule.type constant leaves out final, which it doesn't have" in said
    assert "optim.type muon keeps lr = 0.001 from the type before" in said
    assert "warmup" not in said  # means the same in every schedule


@pytest.mark.parametrize("path", [p for p in SHIPPED if "\npreset = " in p.read_text()], ids=lambda path: path.stem)
def test_every_shipped_model_takes_the_mixers_of_the_guide(path):
    """Fields that a recipe gives its preset's mixer, such as qk_norm, are left out where another mixer lacks them."""
    given = load_toml(path)["model"]
    for name, field, value in (("lsh", "span", 128), ("hyena", "order", 3), ("dilated", "window", 9)):
        changes = {"type": name, field: value}
        spec = resolve_spec(merge(given, {"layer": {"mixer": changes}}), 4096)
        assert {layer.mixer.registry.name_of(type(layer.mixer)) for layer in spec.layers} == {name}
        assert all(getattr(layer.mixer, field) == value for layer in spec.layers)


def test_another_mixer_keeps_a_presets_heads_and_says_nothing_of_defaults(capsys):
    spec = resolve_spec({"preset": "tiny", "position": {"type": "alibi"}}, 512)
    assert spec.layers == resolve_spec({"preset": "tiny"}, 512).layers and not capsys.readouterr().err


def test_a_preset_can_be_changed_field_by_field():
    spec = resolve_spec({"preset": "tiny", "width": "32", "layer": {"mixer": {"heads": 2, "kv_heads": 1}}}, 512)
    assert (spec.width, spec.layers[0].mixer.heads, spec.vocab_size) == (32, 2, 512)


def test_bf16_weights_are_refused_where_small_updates_would_be_lost():
    with pytest.raises(ConfigError, match=r"rounds stochastically.*muon doesn't: use --optim.type adamw"):
        from_dict(Recipe, {"train": {"precision": "bf16", "weights": "bf16"}, "optim": {"type": "muon"}})
    with pytest.raises(ConfigError, match="matmuls in bf16 or fp8"):
        from_dict(Recipe, {"train": {"precision": "fp32", "weights": "bf16"}})
    assert from_dict(Recipe, {"train": {"precision": "bf16", "weights": "bf16"}}).train.weights == "bf16"


def test_help_shows_names_that_can_be_written_and_no_python_paths():
    kinds = {path: kind for path, kind, _, _ in describe_fields(Recipe)}
    assert not [
        kind for kind in kinds.values() if "luban." in kind or "typing" in kind or "<" in kind or "None" in kind
    ]
    assert kinds["model.layer.mixer.layout"] == "local|strided|global_random|blockwise|none"
    assert (
        kinds["model.layer.mixer.qk_norm"] == "layernorm|rmsnorm|none"
        and kinds["model.layer.mixer.kv_heads"] == "int|none"
    )

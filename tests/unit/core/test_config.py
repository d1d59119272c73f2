"""Configurations: strict, and with the nearest right name in every refusal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from luban.core import log
from luban.core.arguments import describe_fields, find_recipe, parse, parse_recipe
from luban.core.config import Partial, from_dict, load_toml, merge, override, to_dict, without_defaults
from luban.core.errors import ConfigError, UsageError
from luban.core.registry import Registry, Variant


class Optimizer(Variant):
    registry: ClassVar[Registry] = Registry("optimizer", {"adamw": f"{__name__}:AdamW", "muon": f"{__name__}:Muon"})


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    lr: float = 1e-3  # peak learning rate
    beta2: float = 0.95  # decay of the second moment

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, {self.lr} given")


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    lr: float = 0.02  # peak learning rate
    # of the update;
    # Nesterov's
    momentum: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Tuned:
    optim: Optimizer | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int  # optimizer steps
    precision: Literal["fp32", "bf16"] = "fp32"  # arithmetic
    deterministic: bool | None = None  # bitwise repeatable
    sizes: tuple[int, ...] = (1, 2)  # any sizes
    out: Path = Path("x")  # where


@dataclass(frozen=True, kw_only=True)
class Recipe:
    train: Train
    optim: Optimizer = field(default_factory=AdamW)  # the optimizer
    init: str = ""  # a model to start from


def test_round_trip_through_plain_data():
    recipe = Recipe(train=Train(steps=3, deterministic=True, sizes=(4,)), optim=Muon(momentum=0.5), init="m")
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert to_dict(recipe)["optim"] == {"type": "muon", "lr": 0.02, "momentum": 0.5}


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"train": {"steps": 1, "precison": "bf16"}},
            r"unknown field 'train\.precison' \(did you mean 'precision'\?\)",
        ),
        ({"train": {"steps": "many"}}, r"train\.steps: a whole number is needed, 'many' given"),
        ({"train": {"steps": 1.5}}, r"train\.steps: a whole number is needed"),
        ({"train": {"steps": True}}, r"train\.steps: a whole number is needed"),
        ({"train": {}}, r"missing field 'train\.steps'"),
        ({"train": 3}, r"train: a table is needed"),
        ({"train": {"steps": 1, "precision": "int4"}}, r"'int4' is not one of fp32, bf16"),
        ({"train": {"steps": 1, "deterministic": "perhaps"}}, r"deterministic: true or false is needed"),
        ({"train": {"steps": 1}, "optim": {"type": "adam"}}, r"unknown optimizer 'adam' \(did you mean 'adamw'\?\)"),
        ({"train": {"steps": 1}, "optim": {"type": "muon", "beta2": 0.9}}, r"unknown field 'optim\.beta2'"),
        ({"train": {"steps": 1}, "optim": {"lr": -1}}, r"optim: lr must be positive"),
    ],
)
def test_refusals_name_the_place_and_the_remedy(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, data)


def test_a_variant_table_without_type_changes_the_default():
    assert from_dict(Recipe, {"train": {"steps": 1}, "optim": {"beta2": 0.9}}).optim == AdamW(beta2=0.9)


def test_command_line_text_becomes_typed_values():
    data = override(
        {"train": {"steps": 1}, "optim": {"type": "adamw", "beta2": 0.9}},
        [
            ("optim.momentum", "0.8"),
            ("train.steps", "1_000"),
            ("optim.type", "muon"),
            ("train.sizes", "[3, 4]"),
            ("train.deterministic", "true"),
            ("train.out", "a/b"),
        ],
    )
    recipe = from_dict(Recipe, data)
    assert recipe.optim == Muon(momentum=0.8)
    assert recipe.train == Train(steps=1000, deterministic=True, sizes=(3, 4), out=Path("a/b"))
    assert (
        from_dict(Recipe, override({"train": {"steps": "1e3", "deterministic": "none"}}, [])).train.deterministic
        is None
    )


def test_a_variant_is_taken_away_by_its_name_none():
    """Where there may be none, and no variant has this name."""
    for value in ("none", {"type": "none"}, {"type": "none", "momentum": 0.8}, None):
        assert from_dict(Tuned, {"optim": value}).optim is None
    assert (
        from_dict(Tuned, override({"optim": {"type": "muon", "momentum": 0.8}}, [("optim.type", "none")])).optim is None
    )
    with pytest.raises(ConfigError, match=r"unknown .*none"):
        from_dict(Recipe, {"train": {"steps": 1}, "optim": {"type": "none"}})


def test_large_integers_survive_text():
    assert from_dict(Train, {"steps": str(2**62 + 1)}).steps == 2**62 + 1


def test_a_recipe_derives_from_another(tmp_path):
    (tmp_path / "a.toml").write_text('[train]\nsteps = 5\nprecision = "bf16"\n[optim]\ntype = "adamw"\nbeta2 = 0.9\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n[train]\nsteps = 6\n[optim]\ntype = "muon"\n')
    recipe = from_dict(Recipe, load_toml(tmp_path / "b.toml"))
    assert recipe.train == Train(steps=6, precision="bf16") and recipe.optim == Muon()  # which has no beta2
    (tmp_path / "c.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_toml(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_toml(tmp_path / "d.toml")


def test_another_type_keeps_the_fields_that_both_have_and_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    (tmp_path / "a.toml").write_text('[train]\nsteps = 5\n[optim]\ntype = "adamw"\nlr = 0.25\nbeta2 = 0.9\n')
    for assignments, optimizer, words in (
        ([], AdamW(lr=0.25, beta2=0.9), ""),
        ([("optim.type", "adamw")], AdamW(lr=0.25, beta2=0.9), ""),
        (
            [("optim.type", "muon")],
            Muon(lr=0.25),
            "optim.type muon keeps lr = 0.25 from the type before and leaves out beta2, which it doesn't have",
        ),
        (
            [("optim.momentum", "0.8"), ("optim.type", "muon"), ("optim.lr", "1")],
            Muon(lr=1.0, momentum=0.8),
            "leaves out beta2",
        ),
    ):
        assert from_dict(Recipe, override(load_toml(tmp_path / "a.toml"), assignments)).optim == optimizer
        assert words in capsys.readouterr().err
    typo = {"train": {"steps": 1}, "optim": {"beat2": 0.9}}  # which no optimizer has
    with pytest.raises(ConfigError, match=r"unknown field 'optim\.beat2'"):
        from_dict(Recipe, override(typo, [("optim.type", "muon")]))
    back = override(load_toml(tmp_path / "a.toml"), [("optim.type", "muon")])
    assert from_dict(Recipe, merge(back, {"optim": {"type": "adamw"}})).optim == AdamW(lr=0.25, beta2=0.9)


def test_what_is_left_at_its_default_is_left_out_and_comes_back():
    recipe = Recipe(train=Train(steps=3, sizes=(4,)), optim=Muon(lr=0.5))
    plain = without_defaults(recipe)
    assert plain == {"train": {"steps": 3, "sizes": [4]}, "optim": {"type": "muon", "lr": 0.5}}
    assert from_dict(Recipe, plain) == recipe


def test_base_names_a_file_or_a_recipe_that_ships(tmp_path):
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    shipped.mkdir()
    own.mkdir()
    (shipped / "tiny_cpu.toml").write_text("[train]\nsteps = 5\n")
    for name in ("tiny_cpu", "tiny_cpu.toml", "recipes/tiny_cpu.toml", "../shipped/tiny_cpu.toml"):
        (own / "mine.toml").write_text(f'base = "{name}"\ninit = "m"\n')
        assert call([str(own / "mine.toml"), "--out", "r"], shipped).recipe == Recipe(train=Train(steps=5), init="m")
    for base, words in (
        ('"tiny_gpu"', "base 'tiny_gpu' is neither a file beside it nor a recipe that ships .*'tiny_cpu'"),
        ('"mine.toml"', "derives from itself"),
        ("3", "base must name a recipe, 3 given"),
        ('"."', "neither a file"),
    ):
        (own / "mine.toml").write_text(f"base = {base}\n")
        with pytest.raises(ConfigError, match=words):
            call([str(own / "mine.toml"), "--out", "r"], shipped)


def test_merge_does_not_change_its_arguments():
    base = {"a": {"b": 1, "c": 2}}
    assert merge(base, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}} and base == {"a": {"b": 1, "c": 2}}


def call(argv, shipped):
    return parse_recipe(Recipe, argv, verb="pretrain", about="Train.", examples="luban pretrain x", shipped=shipped)


def test_recipe_command_line(tmp_path, capsys):
    (tmp_path / "tiny_cpu.toml").write_text("[train]\nsteps = 5\n")
    found = call(["tiny_cpu", "--out", "run", "--train.steps=7", "--optim.type", "muon", "--dry-run"], tmp_path)
    assert found.recipe == Recipe(train=Train(steps=7), optim=Muon()) and found.dry_run and found.out == Path("run")
    assert find_recipe("recipes/tiny_cpu.toml", tmp_path) == tmp_path / "tiny_cpu.toml"
    for argv, words in (
        (["tiny_gpu", "--out", "r"], r"no recipe 'tiny_gpu'.*did you mean 'tiny_cpu'"),
        (["tiny_cpu"], "needs --out"),
        (["tiny_cpu", "--out", "r", "--train.step", "3"], r"unknown field 'train\.step' \(did you mean 'steps'\?\)"),
        (["tiny_cpu", "--out", "r", "--train.steps"], "needs a value"),
        (["--out", "r"], "takes one recipe"),
    ):
        with pytest.raises(UsageError, match=words):
            call(argv, tmp_path)
    with pytest.raises(SystemExit) as stop:
        call(["--help"], tmp_path)
    page = capsys.readouterr().out
    assert stop.value.code == 0 and "--train.steps" in page and "adamw|muon" in page and "peak learning rate" in page


def test_every_field_is_described():
    rows = {path: note for path, _, _, note in describe_fields(Recipe)}
    assert rows["train.steps"] == "optimizer steps" and rows["optim.beta2"] == "decay of the second moment"
    above = {path: note for path, _, _, note in describe_fields(Muon)}
    assert above == {"lr": "peak learning rate", "momentum": "of the update; Nesterov's"}  # comments above the field


@dataclass(frozen=True, kw_only=True)
class Changes:
    optim: Optimizer = field(default_factory=AdamW)
    second: Optimizer | None = None  # of some layers
    train: Train = field(default_factory=lambda: Train(steps=1))


@dataclass(frozen=True, kw_only=True)
class Later:
    train: Train
    tuned: Partial[Changes]


@pytest.mark.parametrize("said", ["muon", {"type": "muon", "momentum": 0.5}])
def test_help_has_the_fields_of_variants_that_a_part_of_a_configuration_chooses(said):
    def rows(**given):
        recipe = from_dict(Later, {"train": {"steps": 1}, "tuned": given})
        return {path: default for path, _, default, _ in describe_fields(Later, of=recipe) if "tuned" in path}

    momentum = "0.5" if isinstance(said, dict) else "0.95"
    found = rows(optim=said, second=said, train={"steps": 7})
    assert found["tuned.optim.type"] == found["tuned.second"] == "muon" and found["tuned.train.steps"] == "7"
    assert found["tuned.optim.momentum"] == found["tuned.second.momentum"] == momentum
    assert not {"tuned.optim.beta2", "tuned.second.beta2"} & set(found)
    unchosen = rows(optim={"lr": 0.5})
    assert unchosen["tuned.optim.type"] == "adamw" and "tuned.optim.beta2" in unchosen
    assert unchosen["tuned.optim.lr"] == "0.5" and unchosen["tuned.second"] == ""


@dataclass(frozen=True)
class Plain:
    """Options."""

    count: int = 1  # how many


def test_plain_verbs_fail_in_one_line():
    assert parse(Plain, ["--count", "3"], verb="x", about="X.") == Plain(count=3)
    for argv in (["--count", "many"], ["--cuont", "3"]):
        with pytest.raises(UsageError) as error:
            parse(Plain, argv, verb="x", about="X.")
        assert "\n" not in str(error.value) and "│" not in str(error.value) and "count" in str(error.value)

"""Training on preferences without a reward model: DPO and its kin, through the same loop as pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from luban.align.preferences import as_preference_shards
from luban.align.reference import load_reference, require_same_reference, with_reference
from luban.align.start import model_of, one_after_another, packed_beside
from luban.core.errors import ConfigError
from luban.core.resuming import Operational
from luban.data.shards import Shards
from luban.load.model import LoadedModel
from luban.objectives.base import Objective
from luban.objectives.preference import Preference
from luban.parallel.device import choose_device
from luban.train.recipe import Recipe
from luban.train.run import train
from luban.train.start import parent_of, require_fitting


@dataclass(frozen=True, kw_only=True)
class DPORecipe(Recipe):
    """A recipe of training on preferences."""

    objective: Objective = field(default_factory=Preference)
    reference: Operational[str] = ""  # MODEL whose log-probabilities answers are compared with (empty: that of init)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.objective, Preference):
            raise ConfigError("luban dpo trains by the objective preference: leave objective.type out")
        if self.reference and not self.objective.method.needs_reference:
            name = self.objective.method.registry.name_of(type(self.objective.method))
            raise ConfigError(f"objective.method.type {name} compares with no reference: leave --reference out")


def dpo(recipe: DPORecipe, out: Path, name: str = "dpo") -> Path:
    """Train the model `recipe.init` on preferences into the run `out`, or resume what is unfinished there.

    `recipe.data.path` is a .jsonl file of preferences, which is packed into `OUT.data` first, or shards of them. The
    reference's log-probabilities are computed once, there too, before training.

    Raises:
        UsageError: no model or no data.
        DataError: preferences that can't be used.
        LineageError: a reference with another vocabulary or chat template.
        ArtifactError: a run at `out` of other preferences, or with another reference.
    """
    with packed_beside(out) as cache:
        ready, model = one_after_another(cache, lambda: prepared(recipe, cache, out))
        return train(ready, out, task="dpo", name=name, model=model)


def prepared(recipe: DPORecipe, cache: Path, out: Path) -> tuple[DPORecipe, LoadedModel]:
    """As `packed`, with the reference's log-probabilities where the loss needs them. What can be refused is refused before they
    are computed."""
    ready, model = packed(recipe, cache)
    assert isinstance(recipe.objective, Preference)
    shards = Shards.open(ready.data.path)
    recipe.objective.require_data(shards)
    require_fitting(recipe, shards, model)
    if not recipe.objective.method.needs_reference:
        return ready, model
    name = recipe.reference or recipe.init
    reference = load_reference(name, model)
    parent = replace(parent_of(name, reference), role="reference")
    require_same_reference(out, shards.path, parent, recipe.train)
    device = choose_device(recipe.train.device)
    path = with_reference(shards.path, reference, parent, recipe.train, device, cache)
    return replace(recipe, data=replace(recipe.data, path=str(path))), model


def packed(recipe: DPORecipe, cache: Path) -> tuple[DPORecipe, LoadedModel]:
    """The recipe with its data packed in `cache`, and the model that it starts from."""
    model = model_of(recipe, "training on preferences", "PAIRS.jsonl")
    path = as_preference_shards(Path(recipe.data.path), model.need_tokenizer(), cache, recipe.train.seed)
    return replace(recipe, data=replace(recipe.data, path=str(path))), model

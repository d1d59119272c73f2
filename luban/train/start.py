"""Where a model's weights come from at the start: drawn from the seed, or another model's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from luban.adapters.base import AdapterConfig, adapters_of
from luban.checkpoint.weights import weights_hash
from luban.core.artifact import MANIFEST, Parent, as_parent
from luban.core.config import merge
from luban.core.errors import ConfigError
from luban.data.shards import Shards
from luban.load.model import LoadedModel, load_model
from luban.models.build import build_model, state_of
from luban.models.config import config_of, resolve_spec
from luban.models.spec import ModelSpec
from luban.nn.position.base import Position
from luban.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model before its first step."""

    spec: ModelSpec
    weights: dict[str, Tensor] | None = None  # None: drawn from the seed
    parents: tuple[Parent, ...] = ()  # the model it starts from
    base: str | None = None  # weights_hash of the frozen model that adapters are trained for
    adapter: AdapterConfig | None = None  # the recipe's; a head that the frozen model lacks is trained whole beside it


def choose_start(recipe: Recipe, shards: Shards, model: LoadedModel | None = None) -> Start:
    """The model that this recipe starts from, checked against the data it will meet.

    Args:
        model: that of `recipe.init`, where it was loaded already.

    Raises:
        LineageError: the model of `init` was made with another tokenizer than the shards.
        ConfigError: `[model]` describes another model than `init`, or a vocabulary that is not the data's.
    """
    vocabulary = shards.vocab_size + recipe.objective.extra_ids()
    if not recipe.init:
        return Start(spec=_check(described_spec(recipe, shards, vocabulary), recipe))
    model = model or load_model(recipe.init)
    require_fitting(recipe, shards, model)
    spec, weights = model.spec, state_of(model.module)
    if set(recipe.model.given) == {"head"}:
        spec, weights = with_head(recipe, spec, weights)
    elif recipe.model.given:
        found, given = config_of(spec), recipe.model.given
        wanted = resolve_spec(given if given.get("preset") else merge(found, given), spec.vocab_size)
        _same_spec(config_of(wanted), found, recipe.init)
    checked = _check(spec, recipe)
    parents = (parent_of(recipe.init, model),)
    if recipe.adapter is None:
        return Start(spec=checked, weights=weights, parents=parents)
    adapter = recipe.adapter
    if spec.head != model.spec.head:  # a tied output layer, which is no tensor of its own, isn't among them
        new = (name.rpartition(".")[0] for name in weights if name.startswith("head."))
        adapter = replace(adapter, modules_to_save=tuple(dict.fromkeys((*adapter.modules_to_save, *new))))
    weights = weights | adapter.initial(spec, weights, recipe.train.seed)
    base = weights_hash(state_of(model.module))
    return Start(spec=checked, weights=weights, parents=parents, base=base, adapter=adapter)


def require_fitting(recipe: Recipe, shards: Shards, model: LoadedModel) -> None:
    """Refuse a model of `recipe.init` that these shards or the recipe's adapter don't fit; costs nothing.

    Raises:
        LineageError: it was made with another tokenizer than the shards.
        ConfigError: its vocabulary is smaller than the data's, or it is an adapter over another model.
    """
    if model.tokenizer is not None:
        recipe.require_tokenizer(shards, model.tokenizer)
    vocabulary = shards.vocab_size + recipe.objective.extra_ids()
    if model.spec.vocab_size < vocabulary:  # a larger one has rows to spare, as foreign models do
        raise ConfigError(
            f"model {recipe.init} has a vocabulary of {model.spec.vocab_size}, shards {shards.path} "
            f"of {vocabulary}: pack the data with the model's tokenizer"
        )
    require_adaptable(recipe, model)


def require_adaptable(recipe: Recipe, model: LoadedModel) -> None:
    """Refuse a model of `recipe.init` that the recipe's adapter can't be put into; reads no data.

    Raises:
        ConfigError, UnsupportedError: as `AdapterConfig.adapt`; the model is an adapter over another one.
    """
    if recipe.adapter is None:
        return
    if adapters_of(model.module):
        raise ConfigError(
            f"{recipe.init} is an adapter over another model: train over its merged weights (luban export "
            f"{recipe.init} --merge --out DIR)"
        )
    spec = headed_spec(recipe, model.spec) if set(recipe.model.given) == {"head"} else model.spec
    twin = build_model(spec, device="meta")
    recipe.adapter.adapt(twin)
    recipe.adapter.pack_base(twin)


def headed_spec(recipe: Recipe, spec: ModelSpec) -> ModelSpec:
    """The same body under the head of `[model.head]`."""
    return resolve_spec(config_of(spec) | {"head": recipe.model.given["head"]}, spec.vocab_size)


def parent_of(init: str, model: LoadedModel) -> Parent:
    """The model of `init` as the run remembers it: a run, else a checkpoint; a foreign one by the hash of its weights."""
    known = next((path for path in (Path(init), model.path) if (path / MANIFEST).is_file()), None)
    if known:
        return as_parent("init", known)
    return Parent(role="init", kind="model", content_hash=weights_hash(state_of(model.module)), name=model.name)


def described_spec(recipe: Recipe, shards: Shards, vocabulary: int) -> ModelSpec:
    """The model of `[model]`; an encoder–decoder that doesn't say what its answers begin with takes the objective's."""
    spec = resolve_spec(recipe.model.given, vocabulary)
    if not spec.body.two_sided or spec.body.decoder_start_ids() is not None:
        return spec
    return replace(spec, body=replace(spec.body, decoder_start=recipe.objective.decoder_start(shards)))  # type: ignore[call-arg]


def with_head(recipe: Recipe, spec: ModelSpec, weights: dict[str, Tensor]) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The same body under the head of `[model.head]`: what the old head doesn't hold is drawn from the seed."""
    changed = headed_spec(recipe, spec)
    if changed.head == spec.head:
        return spec, weights
    fresh = state_of(build_model(changed, seed=recipe.train.seed))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    for each in getattr(spec.head, "heads", ()):  # one of several heads keeps its weights
        own = f"head.heads.{each.name}."
        if each.head == changed.head:
            kept |= {f"head.{key.removeprefix(own)}": weights[key] for key in weights if key.startswith(own)}
            break
    return changed, {name: kept.get(name, tensor) for name, tensor in fresh.items()}


def _check(spec: ModelSpec, recipe: Recipe) -> ModelSpec:
    if recipe.train.seq_len > spec.context:
        raise ConfigError(
            f"train.seq_len is {recipe.train.seq_len}, but the model's context is {spec.context} tokens: "
            "lower --train.seq_len or raise --model.context"
        )
    objective = recipe.objective
    name, body, head = (part.registry.name_of(type(part)) for part in (objective, spec.body, spec.head))
    if body not in objective.bodies or head not in objective.heads:
        raise ConfigError(
            f"objective {name} trains a model of body {' or '.join(objective.bodies)} with head "
            f"{' or '.join(objective.heads)}, and this one has body {body} and head {head}"
        )
    if objective.two_positions:
        _require_two_dimensional(name, {spec.position, *(layer.position or spec.position for layer in spec.layers)})
    objective.require(spec.head, causal=spec.body.causal, tied=spec.tied_head)
    return spec


def _require_two_dimensional(objective: str, positions: Iterable[Position]) -> None:
    for position in positions:
        if not position.two_dimensional:
            able = [name for name, kind in position.registry.items() if kind.two_dimensional]
            raise ConfigError(
                f"objective {objective} gives every token two positions, one in the text and one in its blank, which "
                f"position method {position.registry.name_of(type(position))} can't take: use --model.position.type "
                f"{' or '.join(able)}"
            )


def _same_spec(wanted: dict[str, Any], found: dict[str, Any], init: str | Path) -> None:
    for key in wanted:
        if wanted[key] != found.get(key) and key != "init":  # how it was initialised no longer matters
            raise ConfigError(
                f"the recipe's model.{key} is {wanted[key]!r}, but {init} has {found.get(key)!r}: "
                "leave [model] out to take the model as it is"
            )

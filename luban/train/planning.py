"""A recipe as the search of plans sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.plan import ParallelPlan
from luban.data.shards import Shards
from luban.models.base import Model as ModelBase
from luban.models.build import build_model
from luban.models.config import ModelConfig, resolve_spec
from luban.models.describe import describe
from luban.models.presets import preset
from luban.models.spec import ModelSpec
from luban.parallel.plan_checks import check_plan
from luban.parallel.precision import COMPUTE
from luban.planner.cluster import Cluster
from luban.planner.machine import MachineTable
from luban.planner.search.estimate import Estimate, Workload
from luban.planner.search.layers import Model
from luban.planner.search.messages import Messages
from luban.planner.search.plans import Space
from luban.train.predict import step_settings, trained_shapes
from luban.train.recipe import Recipe
from luban.train.start import choose_start


@dataclass(frozen=True)
class Planned:
    """What is searched, and what the runtime says of a plan that was found."""

    spec: ModelSpec
    workload: Workload
    space: Space

    def refusal(self, estimate: Estimate) -> str | None:
        """Why the runtime can't execute a plan; None: it can."""
        plan = estimate.candidate.plan
        try:
            check_plan(plan, self.spec, self.model)
            plan.check_batch(self.workload.batch, 1 if plan.pipeline > 1 else estimate.candidate.accumulate)
        except (ConfigError, UnsupportedError) as error:
            return str(error)
        return None

    @cached_property
    def model(self) -> ModelBase:
        """The model on the meta device."""
        return build_model(self.spec, device="meta")


def spec_of(recipe: Recipe) -> ModelSpec:
    """The recipe's model, with the data's vocabulary where data are given, otherwise its preset's or the default."""
    if recipe.data.path:
        return choose_start(recipe, Shards.open(recipe.data.path, "train")).spec
    if recipe.init:
        raise ConfigError("a plan for --init needs the data, too: give --data.path")
    given = recipe.model.given
    known = preset(given["preset"]).vocab_size if given.get("preset") else ModelConfig.vocab_size
    return resolve_spec(given, int(given.get("vocab_size", known)))


def planned(recipe: Recipe, cluster: Cluster, table: MachineTable) -> Planned:
    """The recipe's workload on a cluster and the plans to try. Nothing is allocated.

    Raises:
        ConfigError: the model isn't a stack of layers.
    """
    spec, train = spec_of(recipe), recipe.train
    if not spec.layers:
        raise ConfigError("plans are searched for stacks of Transformer layers, and this model has none")
    dtype = str(COMPUTE[train.precision]).removeprefix("torch.")
    graph = describe(spec, batch=1, seq=train.seq_len, dtype=dtype)
    shapes, _ = trained_shapes(spec, recipe.adapter)
    settings = step_settings(replace(recipe, plan=ParallelPlan()), spec, torch.device("cuda"))
    model = Model(graph, settings, table, Messages(cluster, table), train.precision)
    workload = Workload(
        model,
        train.batch_size,
        train.seq_len,
        settings,
        optimizer_bytes=settings.optimizer_bytes / max(sum(map(math.prod, shapes.values())), 1),
        weight_bytes=graph.itemsize,
        gradient_bytes=max(graph.itemsize, 4),
    )
    heads = [a.heads for layer in spec.layers if (a := layer.mixer.attention(spec.width)) is not None]
    experts = [round(op.parameters / op.in_features / op.out_features) for op in graph.ops if op.role == "expert"]
    space = Space(
        heads=math.gcd(*heads) if heads else 1,
        layers=len(graph.layers()),
        experts=math.gcd(*experts) if experts else 0,
        context=not spec.body.two_sided,
    )
    return Planned(spec, workload, space)


def settings_of(estimate: Estimate) -> dict[str, dict[str, object]]:
    """A plan as tables of a recipe."""
    plan, default = estimate.candidate.plan, ParallelPlan()
    changed = {name: value for name, value in vars(plan).items() if value != getattr(default, name)}
    accumulate = 1 if plan.pipeline > 1 else estimate.candidate.accumulate
    return {"plan": changed, "train": {"accumulate": accumulate}}

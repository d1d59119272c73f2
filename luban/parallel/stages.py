"""A model cut into stages of a pipeline, without the model knowing of it.

Every process runs the forward pass of the whole loss module, of which it holds its stages alone: the layers of a stack that
lie before a stage are replaced by the hidden states that another process sent, and the forward pass ends where the next
process goes on. Masks, positions and rotations follow from the batch, which every process reads.

Stacks are numbered in the order in which they run: the encoder of an encoder–decoder is 0, its decoder 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.base import Model
from luban.models.stack import Layers, TransformerStack, stacks_of
from luban.nn.context import ForwardContext
from luban.nn.position.base import PositionMethod
from luban.parallel.channels import alike_groups
from luban.parallel.gradients import Shared
from luban.parallel.world import World
from luban.planner.pipeline.routes import Routes, StackPart, stage_parts


class StageEnd(Exception):
    """Ends a stage's forward pass; `hidden`: stack → its states, of those that have begun."""

    def __init__(self, hidden: dict[int, Tensor]):
        super().__init__()
        self.hidden = hidden


@dataclass
class Boundary:
    """What goes into the stage that is running, and which stage that is."""

    routes: Routes
    stage: int = 0
    received: Mapping[int, Tensor] = field(default_factory=dict)  # stack → hidden states from another stage
    finished: dict[int, Tensor] = field(default_factory=dict)  # stack → its output, of those that have ended

    def begin(self, stage: int, received: Mapping[int, Tensor]) -> None:
        """Before a forward pass."""
        self.stage, self.received, self.finished = stage, received, {}

    def part(self, stack: int) -> StackPart:
        """The running stage's part of a stack."""
        return self.routes.parts[self.stage][stack]


def cut_stages(model: Model, plan: ParallelPlan, process: int) -> Boundary:
    """Leave of a model on the meta device what a process of the pipeline needs for its stages.

    Raises:
        ConfigError: there are more stages than layers, or the model has no stack of layers.
    """
    stacks = stacks_of(model)
    depths = [len(stack.block_of) for stack in stacks]
    check_stages(plan, sum(depths))
    parts_of = stage_parts(depths, plan.stage_runs(sum(depths)))
    boundary = Boundary(Routes(parts_of, plan.pipeline))
    mine = [parts_of[stage] for stage in range(process, plan.stages, plan.pipeline)]
    for k, stack in enumerate(stacks):
        parts = [stage[k] for stage in mine]
        layers = [layer for part in parts for layer in part.layers]
        stack.blocks = StageLayers(stack.blocks, {stack.block_of[layer] for layer in layers}, k, boundary)
        if not any(part.last for part in parts):
            stack.norm = None
        if not layers:
            stack.position, stack.layer_positions = PositionMethod(), nn.ModuleDict()
        _run_in_stages(stack, k, boundary, model.spec.width)
    if process != (plan.stages - 1) % plan.pipeline:
        model.head = nn.Module()
    _drop_embeddings(model, stacks, {k for stage in mine for k, part in enumerate(stage) if part.first})
    return boundary


def _drop_embeddings(model: Model, stacks: list[TransformerStack], kept: set[int]) -> None:
    """Drop the embeddings of other stages, but keep a table whose weight is used here by another module: in the whole model
    it has the name of the first that holds it."""
    dropped = {k: stack.embedding for k, stack in enumerate(stacks) if k not in kept and stack.embedding is not None}
    for k in dropped:
        stacks[k].embedding = None
    used = {id(parameter) for parameter in model.parameters()}
    for k, embedding in dropped.items():
        if id(embedding.tokens.weight) in used:
            stacks[k].embedding = SharedTable(embedding.tokens)  # type: ignore[assignment]


class SharedTable(nn.Module):
    """In place of an embedding: the table of tokens, where another module of the stage uses its weight."""

    def __init__(self, tokens: nn.Module):
        super().__init__()
        self.tokens = tokens


def check_stages(plan: ParallelPlan, layers: int) -> None:
    """Raise ConfigError unless so many layers can be cut into the plan's stages."""
    if not layers:
        raise ConfigError("plan.pipeline cuts stacks of Transformer layers, and this model has none: use --plan.shard")
    if layers < plan.stages:
        each = plan.stages // plan.pipeline
        needed = f"{plan.stages} layers" if each == 1 else f"{plan.stages} layers for {each} stages a process"
        fewer = f"at most --plan.pipeline {max(layers // each, 1)}"
        raise ConfigError(
            f"plan.pipeline {plan.pipeline} needs {needed}, and there are {layers}: use {fewer}"
            f"{' or --plan.schedule 1f1b' * (each > 1)}"
        )
    plan.stage_runs(layers)


class StageLayers(Layers):
    """The blocks that a process has of one stack; they run those of the current stage."""

    def __init__(self, blocks: Layers, mine: set[str], stack: int, boundary: Boundary):
        super().__init__({key: block for key, block in blocks.items() if key in mine})
        self.stack, self.boundary = stack, boundary

    def forward(self, x_BTE: Tensor, ctx: ForwardContext, block_of: Mapping[int, str]) -> Tensor:
        """(B, T, E) → (B, T, E). Raises StageEnd where the next stage goes on in this stack."""
        part = self.boundary.part(self.stack)
        if not part.first:
            x_BTE = self.boundary.received[self.stack]
        x_BTE = self.run(x_BTE, ctx, block_of, part.layers)
        if not part.last:
            raise StageEnd({**self.boundary.finished, self.stack: x_BTE})
        return x_BTE


def _run_in_stages(stack: TransformerStack, number: int, boundary: Boundary, width: int) -> None:
    """Let a stack's forward skip what lies in other stages."""
    whole = stack.forward

    def forward(x: Tensor, ctx: ForwardContext, segments: Tensor | None = None) -> Tensor:
        part = boundary.part(number)
        if part.finished:
            found = boundary.received[number]
        elif not part.layers:
            raise StageEnd(dict(boundary.finished))
        elif part.first:
            found = whole(x, ctx, segments)
        else:  # hidden states come from another process, so that there is nothing to embed
            embedding, stack.embedding = stack.embedding, None
            like = boundary.received[number]
            try:
                found = whole(like.new_zeros(()).expand(*x.shape[:2], width), ctx, segments)
            finally:
                stack.embedding = embedding
        boundary.finished[number] = found
        return found

    stack.forward = forward  # type: ignore[method-assign]


def run_stage(function: Any, *args: Any) -> Any:
    """`function(*args)`, or stack → hidden states where another stage goes on."""
    try:
        return function(*args)
    except StageEnd as end:
        return end.hidden


def shared_by_stages(parameters: Mapping[str, Tensor], world: World) -> dict[str, Shared]:
    """The parameters that several processes of the pipeline hold, by the groups of these and by name, in all processes in the
    same order. Every process must call it."""
    if world.plan.pipeline == 1:
        return {}
    pipeline = world.group("pipeline")
    known: list[Any] = [None] * world.plan.pipeline
    dist.all_gather_object(
        known, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, group=pipeline
    )
    ranks = dist.get_process_group_ranks(pipeline)
    holders = {
        name: [rank for rank, names in zip(ranks, known, strict=True) if name in names]
        for names in known
        for name in names
    }
    several = {name: tuple(held) for name, held in holders.items() if len(held) > 1}
    whole = tuple(ranks)
    mine = {held for held in several.values() if dist.get_rank() in held}
    groups = {whole: pipeline, **alike_groups(mine - {whole})}
    return {
        name: Shared(
            len(several[name]),
            next(names[name] for names in known if name in names),
            groups[several[name]] if dist.get_rank() in several[name] else None,
        )
        for name in sorted(several, key=lambda name: (several[name], name))
    }


def leaf(hidden: Tensor) -> Tensor:
    """Hidden states as a stage begins with them: of gradients that go back to where they came from."""
    x = hidden.detach()
    return x.requires_grad_() if torch.is_floating_point(x) else x

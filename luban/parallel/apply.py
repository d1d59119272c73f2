"""The one place where a model is made ready to train, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luban.core.errors import ArtifactError, ConfigError
from luban.core.plan import SCHEDULES, ParallelPlan
from luban.models.base import Model
from luban.models.build import materialise, state_of
from luban.models.stack import blocks_of, stacks_of
from luban.nn.float8 import use_float8
from luban.nn.init import FindRegion, initialise
from luban.nn.roles import roles_of
from luban.objectives.base import LossModule, LossOutput, TensorBatch
from luban.optim.base import OptimizerConfig
from luban.parallel.asynchronous import Asynchronous
from luban.parallel.channels import Channels
from luban.parallel.collectives import Peers
from luban.parallel.compile import LossFunction, compiled_loss
from luban.parallel.context import RingAttention, check_context
from luban.parallel.device import can_compile
from luban.parallel.engine import TrainEngine
from luban.parallel.expert import check_experts, divide_experts, held_apart
from luban.parallel.gradients import GradientSums
from luban.parallel.heads import DividedHeads, HeadRange
from luban.parallel.matrices import Matrices
from luban.parallel.micro_batches import OneAfterTheOther, Runner
from luban.parallel.mixers import check_mixers
from luban.parallel.offload.delayed import DelayedOptimizer
from luban.parallel.offload.host_params import HostParams
from luban.parallel.offload.tiles import use_tiles
from luban.parallel.pipelined import Pipelined
from luban.parallel.placement import Placements
from luban.parallel.plan_checks import check_prompts, check_run, shared_refusal
from luban.parallel.precision import COMPUTE, LossScale, MixedPrecisionParams
from luban.parallel.remat import remat_policy
from luban.parallel.remat.scheduled import schedule_stacks
from luban.parallel.replicated_params import ReplicatedParams
from luban.parallel.routers import Routers, routers_of
from luban.parallel.stages import Boundary, cut_stages, run_stage, shared_by_stages
from luban.parallel.tensor import OverlappedTokens, SlicedTokens, divide
from luban.parallel.world import World

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a device runs the training steps."""

    device: torch.device
    precision: str = "fp32"  # of the matmuls: fp64, fp32, bf16, fp16, fp8
    masters: bool = True  # fp32 weights behind half-precision ones
    compile: bool = False  # by torch.compile
    accumulate: int = 1  # micro-batches a step
    clip: float = 1.0  # bound on the global gradient norm (0: none)
    world: World = field(default_factory=World)  # the processes of the run


def apply(
    loss: LossModule,
    plan: ParallelPlan,
    optimizer: OptimizerConfig,
    *,
    execution: Execution | None = None,
    init: Mapping[str, Tensor] | int | None = None,
    adapt: Callable[[Model], None] | None = None,
    evaluation: LossModule | None = None,
    rates: Callable[[Model], Mapping[str, float]] | None = None,
    pack: Callable[[Model], None] | None = None,
) -> TrainEngine:
    """Make a loss module on the meta device ready to train.

    Args:
        loss: what is trained; its model is built on the meta device.
        plan: how it is spread over devices, and what it recomputes.
        optimizer: updates the parameters that require a gradient.
        execution: where and how steps run; None: in fp32 on the CPU.
        init: the model's weights by name, or the seed that they are drawn from; None: seed 0. What `adapt` adds and these
            weights don't have is drawn from seed 0.
        adapt: changes the model before anything is placed (adapters). What it freezes of the model is kept in the precision of
            the matmuls, has no optimizer state and isn't part of the engine's state.
        evaluation: measures held-out batches with the same model; None: `loss`.
        rates: factors on the learning rate of the adapted model's parameters, by name; those not named have 1.
        pack: puts frozen weights into fewer bits, once they are set.

    Raises:
        ConfigError: the plan can't spread this optimizer or precision.
    """
    model: Model = loss.model
    experts = {name: layer.count for name, layer in routers_of(model).items()}
    execution = execution or Execution(device=torch.device("cpu"))
    if plan.processes != execution.world.size:
        raise ConfigError(f"the plan is for {plan.processes} processes, and there are {execution.world.size}")
    check_run(
        plan,
        optimizer,
        precision=execution.precision,
        masters=execution.masters,
        compiles=execution.compile,
        clip=execution.clip,
        adapted=adapt is not None,
        packed=pack is not None,
    )
    check_mixers(model.spec, plan)
    world, losses = execution.world, (loss, evaluation or loss)
    blocks, own = blocks_of(model), frozenset(state_of(model))
    # Adapters first: everything below must see their modules, too.
    fixed: frozenset[str] = frozenset()
    if adapt is not None:
        adapt(model)
        check_prompts(model, plan)
        fixed = own - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Precision next, since it decides how owners multiply; 8 bits serve the layers alone.
    if execution.precision == "fp8":
        for block in blocks:
            use_float8(block)
    # What all processes must agree on is read off the whole model: a stage of it may have no mixture of experts.
    factors = {} if rates is None else rates(model)
    check_experts(model, plan)
    if plan.offload_tiles:
        for block in blocks:
            use_tiles(block, plan.offload_tiles)
    apart = held_apart(model, world)
    # Then what this process has of the model, layers before matrices: whatever wraps the model later meets parameters and
    # communication as they are here.
    boundary = cut_stages(model, plan, world.index("pipeline")) if plan.pipeline > 1 else None
    placements = divide_experts(model, world, _divide(model, losses, plan, execution))
    # Rematerialisation inside of compilation, so that the compiler sees what is computed again and fuses it.
    blocks = blocks_of(model)
    for block in blocks:
        block.use_remat(remat_policy(plan.layer_policy, block))
    # Schedules run around compiled layers instead: they decide when a layer runs, not what it keeps inside.
    if plan.remat in SCHEDULES:
        timed = execution.world.size == 1
        schedule_stacks(stacks_of(model), plan.remat, plan.remat_budget, timed=timed, world=world)
    # Compilation only marks modules here: graphs are traced in the first step, over the parameters that exist then. Hooks of
    # FSDP and messages stand around blocks, so that with several processes blocks are compiled one by one.
    functions = _compiled(losses, plan, execution)
    model.to(torch.float64 if execution.precision == "fp64" else torch.float32)
    # FSDP around what is compiled, and before there is memory, so that every process takes that of its shard alone.
    if boundary is not None:
        functions = [partial(run_stage, function) for function in functions]
    root, dtype = None, COMPUTE[execution.precision]
    offloads = plan.offload != "none"
    if plan.shards_by_layer:
        root = Losses(*losses)
        alone = {p for name, p in model.named_parameters() if name in apart}
        from luban.parallel.sharded_params import shard_modules  # FSDP is slow to import

        shard_modules(
            root, list(blocks), world.shard_mesh, zero=plan.zero_stage, dtype=dtype, apart=alone, offloads=offloads
        )
        functions = [partial(root, function) for function in functions]
    # Memory only now; weights are drawn by the parameters' names, so that they don't depend on any of the above.
    materialise(model, torch.device("cpu") if offloads else execution.device)
    region = placements.region
    if plan.keeps_weights and not placements.divided:
        from luban.parallel.whole_weights import own_rows

        region = own_rows(model, world, placements, apart)
    _set_weights(model, init, own, placements, region)
    if pack is not None:
        pack(model)
    params: ShardedParams | MixedPrecisionParams
    if plan.keeps_weights:
        from luban.parallel.whole_weights import WholeWeights

        made = WholeWeights
        if offloads:
            from luban.parallel.offload.host_rows import HostRows

            made = partial(HostRows, device=execution.device, plan=plan)
        params = made(model, blocks, world, zero=plan.zero_stage, dtype=dtype, fixed=fixed, apart=apart)
        for stack in stacks_of(model):
            stack.blocks.before = params.ready
        functions = [partial(_after, params.ready_outside, function) for function in functions]
    elif root is not None:
        from luban.parallel.sharded_params import ShardedParams

        params = ShardedParams(root, model, zero=plan.zero_stage, fixed=fixed, device=execution.device)
    elif offloads:
        params = HostParams(model, blocks, dtype, execution.device, plan, fixed=fixed)
        params.place(loss)
        if (layers := params.layers) is not None:
            for stack in stacks_of(model):
                stack.blocks.before, stack.blocks.after = layers.fetch, layers.watch
    elif plan.pipeline == 1 and world.copies > 1:
        params = ReplicatedParams(model, blocks, world, dtype, masters=execution.masters, fixed=fixed, apart=apart)
    else:
        params = MixedPrecisionParams(model, dtype, masters=execution.masters, fixed=fixed)
    sums = GradientSums(
        world,
        placements,
        params.begins(),
        apart=apart,
        summed=plan.shard > 1 or isinstance(params, ReplicatedParams),
        staged=shared_by_stages(params.parameters, world),
    )
    step, heldout = functions
    runner: Runner = OneAfterTheOther(step, heldout, params)
    if boundary is not None:
        runner = _pipeline(loss, functions, params, boundary, execution, sums)
    # The optimizer last: it holds the very tensors that are trained.
    divided = None if optimizer.elementwise or plan.shard * plan.tensor == 1 else Matrices(params, placements)
    built = optimizer.build(params.parameters, roles_of(model), divided, factors)
    params.keep_moments(built)
    built = DelayedOptimizer(built) if plan.offload_delay else built
    return TrainEngine(
        runner,
        params,
        built,
        LossScale.of(execution.precision),
        module=loss,
        clip=execution.clip,
        accumulate=execution.accumulate,
        device=execution.device,
        sums=sums,
        routers=Routers.of(experts, model),
    )


def _after(wait: Callable[[], None], function: LossFunction, batch: TensorBatch) -> LossOutput:
    """`function` of the batch, once what it needs is there."""
    wait()
    return function(batch)


class Losses(nn.Module):
    """The root of what FSDP divides: it gathers what lies in no block, for the loss that is trained and for held-out text."""

    def __init__(self, loss: LossModule, heldout: LossModule):
        super().__init__()
        self.loss, self.heldout = loss, heldout

    def forward(self, function: LossFunction, batch: TensorBatch) -> LossOutput:
        """`function` of the batch, one of the two losses."""
        return function(batch)


def _divide(
    model: Model, losses: tuple[LossModule, LossModule], plan: ParallelPlan, execution: Execution
) -> Placements:
    """Matrices over the axis tensor, tokens over the axis context: divided parameters, and attention of what is here."""
    world, heads, placements = execution.world, None, Placements()
    if plan.context > 1:
        check_context(model)
    if plan.tensor > 1:
        group = world.group("tensor")
        peers = Peers.of(group)
        tokens = OverlappedTokens if _compiles(execution) else SlicedTokens
        heads, placements = HeadRange(peers), divide(model, peers, group, experts=plan.expert == 1, tokens=tokens)
    for module in losses:
        kernel = None if module.attention is None else module.attention.kernel
        if plan.context > 1 and kernel not in (None, "torch"):
            raise ConfigError(f"train.attention {kernel} does not go with plan.context: leave it out")
        if plan.context > 1:
            module.attention = RingAttention(world.group("context"), heads)
        elif heads is not None:
            module.attention = DividedHeads(heads, kernel)
    return placements


def _compiles(execution: Execution) -> bool:
    """Whether layers are compiled."""
    return execution.compile and can_compile(execution.device)


def _compiled(losses: tuple[LossModule, LossModule], plan: ParallelPlan, execution: Execution) -> list[LossFunction]:
    """The losses, compiled if that is wanted and can be."""
    if not _compiles(execution):
        return list(losses)
    regions = execution.device.type == "cuda" or plan.shard * plan.parts > 1 or plan.remat in SCHEDULES
    regions = regions or plan.offload_weights != "none"  # weights come between blocks
    # the ring's messages, mixtures of experts and reversible layers stand outside of compiled graphs
    reversible = any(block.reversible for block in blocks_of(losses[0]))
    whole = plan.context == 1 and not routers_of(losses[0]) and not reversible
    return [compiled_loss(loss, regions=regions, whole=whole, overlap=plan.tensor > 1) for loss in losses]


def _pipeline(
    loss: LossModule,
    functions: Sequence[LossFunction],
    params: ShardedParams | MixedPrecisionParams,
    boundary: Boundary,
    execution: Execution,
    sums: GradientSums,
) -> Pipelined:
    """What runs this process's stages. Raises ConfigError where stages that update by themselves share parameters."""
    world, plan = sums.world, sums.world.plan
    links = [(source, target) for _, source, target in boundary.routes.messages]
    channels = Channels(links, world.group("pipeline"), execution.device)
    dtype = torch.float64 if execution.precision == "fp64" else torch.float32
    parts = (*functions, params, boundary, channels, world, dtype)
    if plan.schedule != "pipedream":
        return Pipelined(*parts)  # type: ignore[arg-type]
    if sums.staged:
        raise shared_refusal(next(iter(sums.staged)))
    return Asynchronous(*parts, module=loss)  # type: ignore[arg-type]


@torch.no_grad()
def _set_weights(
    model: Model,
    init: Mapping[str, Tensor] | int | None,
    own: Collection[str],
    placements: Placements,
    region: FindRegion,
) -> None:
    """Draw weights from a seed, or take given ones up and draw the rest. Raises ArtifactError where one of the model's `own` is
    missing; those of adapters may be. `region`: the parts that are drawn."""
    weights = init if isinstance(init, Mapping) else {}
    seed = init if isinstance(init, int) else 0
    layers = max(len(model.spec.layers), 1)
    initialise(model, model.spec.init, layers=layers, seed=seed, region=region, without=frozenset(weights))
    if not weights:
        return
    for name, tensor in state_of(model).items():
        if name in weights:
            placements.take(name, tensor, weights[name])
        elif name in own:
            raise ArtifactError(f"the weights to start from lack {name}, which the model has")

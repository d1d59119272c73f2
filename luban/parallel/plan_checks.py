"""Which plans a model and a run's settings go with: asked before anything starts, by training and by `--dry-run` alike."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from luban.core.errors import ConfigError
from luban.core.plan import SCHEDULES, ParallelPlan
from luban.models.base import Model
from luban.models.build import build_model
from luban.models.spec import ModelSpec
from luban.models.stack import stacks_of
from luban.optim.adamw import AdamW
from luban.optim.base import OptimizerConfig
from luban.parallel.context import check_context
from luban.parallel.expert import check_experts
from luban.parallel.mixers import check_mixers
from luban.parallel.stages import check_stages, cut_stages
from luban.parallel.tensor import check_tensor


class Adapter(Protocol):
    """What puts trained parameters beside a frozen model."""

    def adapt(self, model: Model) -> None:
        """Change the model."""
        ...


def check_plan(plan: ParallelPlan, spec: ModelSpec, model: Model | None = None, adapter: Adapter | None = None) -> None:
    """Raise ConfigError if the plan can't divide the model; the message names one that could.

    Args:
        model: of `spec`, on the meta device; None: it is built.
        adapter: that the model is trained with.
    """
    check_mixers(spec, plan)
    if plan.processes == 1 or (plan.parts == plan.expert == 1 and adapter is None):
        return
    model = model or build_model(spec, device="meta")
    check_experts(model, plan)
    if plan.context > 1:
        check_context(model)
    if plan.pipeline > 1:
        check_stages(plan, sum(len(stack.block_of) for stack in stacks_of(model)))
    if plan.tensor > 1:
        check_tensor(model, plan.tensor)
    if plan.pipeline > 1 and plan.schedule == "pipedream":
        _check_unshared(plan, spec)
    if adapter is not None:
        adapted = build_model(spec, device="meta")
        adapter.adapt(adapted)
        check_prompts(adapted, plan)


def check_run(
    plan: ParallelPlan,
    optimizer: OptimizerConfig,
    *,
    precision: str,
    masters: bool,
    compiles: bool,
    clip: float,
    adapted: bool,
    packed: bool,
) -> None:
    """Raise ConfigError for settings of a run that the plan doesn't go with.

    Args:
        optimizer: of the run.
        precision: of the matmuls.
        masters: whether fp32 weights stand behind half-precision ones.
        compiles: whether layers are to be compiled.
        clip: bound on the global gradient norm (0: none).
        adapted: whether adapters are trained beside a frozen model; packed: whether that is in fewer bits.
    """
    if plan.offload != "none" and not (isinstance(optimizer, AdamW) and optimizer.moments == "fp32"):
        raise ConfigError(
            "plan.offload updates by Adam with fp32 moments on the host: use --optim.type adamw --optim.moments fp32"
        )
    if plan.offload != "none" and not masters:
        raise ConfigError(
            f"train.weights bf16 does not go with plan.offload {plan.offload}, which keeps fp32 weights outside of the device: "
            "leave it out"
        )
    if plan.remat in SCHEDULES and plan.remat_layer != "none" and not compiles:
        raise ConfigError(
            f"plan.remat_layer {plan.remat_layer} needs compiled layers, whose graphs say what they keep: "
            "use --train.compile true"
        )
    _check_schedule(plan, precision=precision, compiles=compiles, clip=clip)
    divides = " and ".join(f"plan.{axis}" for axis in ("shard", "tensor") if getattr(plan, axis) > 1)
    if not divides:
        return
    if precision == "fp8" or (plan.shard > 1 and not masters):
        what = f"train.precision {precision}" if masters else "train.weights bf16"
        raise ConfigError(f"{what} does not go with {divides}: use --train.precision bf16 with fp32 weights")
    if packed:
        raise ConfigError(f"packed weights (adapter.base) do not go with {divides}: use --plan.replicate")
    if plan.tensor > 1 and adapted:
        raise ConfigError("adapters do not go with plan.tensor: use --plan.shard")


def _check_schedule(plan: ParallelPlan, *, precision: str, compiles: bool, clip: float) -> None:
    """Raise ConfigError for what doesn't go with a schedule that splits backward passes, or that updates in between."""
    if plan.pipeline == 1 or plan.schedule not in ("zero_bubble", "pipedream"):
        return
    what, other = f"plan.schedule {plan.schedule}", "use --plan.schedule 1f1b or interleaved"
    if compiles:
        raise ConfigError(f"{what} does not go with train.compile: {other}")
    if plan.shard > 1:
        raise ConfigError(f"{what} does not go with plan.shard, whose hooks need a whole backward pass: {other}")
    if plan.schedule == "zero_bubble" and plan.remat != "none":
        raise ConfigError(f"{what} does not go with plan.remat, which would run twice: {other}")
    if plan.schedule == "zero_bubble":
        return
    if plan.tensor > 1 or plan.context > 1:
        raise ConfigError(f"{what} goes with plan.replicate alone: {other}")
    if clip:
        raise ConfigError(f"{what} has no moment at which all gradients are known: use --train.clip 0, or {other[4:]}")
    if precision == "fp16":
        raise ConfigError(f"{what} does not go with train.precision fp16: use --train.precision bf16")


def _check_unshared(plan: ParallelPlan, spec: ModelSpec) -> None:
    """Raise ConfigError if several processes of the pipeline would have the same parameter."""
    held: Counter[str] = Counter()
    for process in range(plan.pipeline):
        model = build_model(spec, device="meta")
        cut_stages(model, plan, process)
        held.update(name for name, _ in model.named_parameters())
    for name, count in held.items():
        if count > 1:
            raise shared_refusal(name)


def shared_refusal(name: str) -> ConfigError:
    """What to raise for a parameter that several stages of PipeDream's schedule would have."""
    return ConfigError(
        f"the stages of plan.schedule pipedream update by themselves, and several have {name}: use "
        "--plan.schedule 1f1b, or a model that shares nothing between its layers (model.tied_head = false, positions without weights "
        "of their own such as --model.position.type rope)"
    )


def check_prompts(model: Model, plan: ParallelPlan) -> None:
    """Raise ConfigError for a plan under which no process can compute the keys and values that an adapter puts before every text."""
    prompts = getattr(model, "prompts", None)
    if prompts is None:
        return
    axes = ("pipeline", "context", "shard") if prompts.runs_layers else ("pipeline", "context")
    if divides := " and ".join(f"plan.{axis}" for axis in axes if getattr(plan, axis) > 1):
        other = "--plan.replicate" if prompts.runs_layers else "--plan.shard or --plan.replicate"
        raise ConfigError(f"adapters that put keys and values before every text do not go with {divides}: use {other}")

"""The one place where a model is made ready to train, in the one order that works."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ArtifactError
from luban.core.plan import ParallelPlan
from luban.models.base import Model
from luban.models.build import materialise, state_of
from luban.nn.float8 import use_float8
from luban.nn.init import initialise
from luban.nn.roles import roles_of
from luban.objectives.base import LossModule
from luban.optim.base import OptimizerConfig
from luban.parallel.compile import blocks_of, compiled_loss
from luban.parallel.device import can_compile
from luban.parallel.engine import TrainEngine
from luban.parallel.precision import COMPUTE, LossScale, MixedPrecisionParams
from luban.parallel.remat import remat_policy
from luban.parallel.shard import local_region


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a device runs the training steps."""

    device: torch.device
    precision: str = "fp32"  # of the matmuls: fp64, fp32, bf16, fp16, fp8
    masters: bool = True  # fp32 weights behind half-precision ones
    compile: bool = False  # by torch.compile
    accumulate: int = 1  # micro-batches a step
    clip: float = 1.0  # bound on the global gradient norm (0: none)


def apply(
    loss: LossModule,
    plan: ParallelPlan,
    optimizer: OptimizerConfig,
    *,
    execution: Execution | None = None,
    init: Mapping[str, Tensor] | int | None = None,
    adapt: Callable[[nn.Module], None] | None = None,
    evaluation: LossModule | None = None,
) -> TrainEngine:
    """Make a loss module on the meta device ready to train.

    Args:
        loss: what is trained; its model is built on the meta device.
        plan: how it is spread over devices, and what it recomputes.
        optimizer: updates the parameters that require a gradient.
        execution: where and how steps run; None: in fp32 on the CPU.
        init: the model's weights by name, or the seed that they are drawn from; None: seed 0. What `adapt` adds and these
            weights don't have is drawn from seed 0.
        adapt: changes the model before anything is placed (adapters).
        evaluation: measures held-out batches with the same model; None: `loss`.
    """
    model: Model = loss.model
    execution = execution or Execution(device=torch.device("cpu"))
    blocks, own = blocks_of(model), frozenset(state_of(model))
    # Adapters first: everything below must see their modules, too.
    if adapt is not None:
        adapt(model)
    # Precision next, since it decides how owners multiply; 8 bits serve the layers alone.
    if execution.precision == "fp8":
        for block in blocks:
            use_float8(block)
    # Rematerialisation inside of compilation, so that the compiler sees what is computed again and fuses it.
    policy = remat_policy(plan.remat)
    for block in blocks:
        block.use_remat(policy)
    # Compilation only marks modules here: graphs are traced in the first step, over the parameters that exist then.
    compiled = execution.compile and can_compile(execution.device)
    regions = execution.device.type == "cuda"
    step = compiled_loss(loss, regions=regions) if compiled else loss
    heldout = step
    if evaluation is not None:
        heldout = compiled_loss(evaluation, regions=regions) if compiled else evaluation
    # Memory only now; weights are drawn by the parameters' names, so that they don't depend on any of the above.
    model.to(torch.float64 if execution.precision == "fp64" else torch.float32)
    materialise(model, execution.device)
    weights = init if isinstance(init, Mapping) else {}
    seed = init if isinstance(init, int) else 0
    given = frozenset(weights)
    layers = max(len(model.spec.layers), 1)
    initialise(model, model.spec.init, layers=layers, seed=seed, region=local_region, without=given)
    if weights:
        _load(model, weights, own)
    params = MixedPrecisionParams(model, COMPUTE[execution.precision], masters=execution.masters)
    # The optimizer last: it holds the very tensors that are trained.
    built = optimizer.build(params.parameters, roles_of(model))
    return TrainEngine(
        step,
        heldout,
        params,
        built,
        LossScale.of(execution.precision),
        module=loss,
        clip=execution.clip,
        accumulate=execution.accumulate,
        device=execution.device,
    )


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Tensor], own: Collection[str]) -> None:
    """Take weights up. Raises ArtifactError where one of the model's `own` is missing; those of adapters may be."""
    for name, tensor in state_of(model).items():
        if name in weights:
            tensor.copy_(weights[name])
        elif name in own:
            raise ArtifactError(f"the weights to start from lack {name}, which the model has")

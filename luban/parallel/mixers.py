"""Which plans a model's token mixers and arrangements can't be trained under."""

from __future__ import annotations

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.spec import ModelSpec


def check_mixers(spec: ModelSpec, plan: ParallelPlan) -> None:
    """Raise ConfigError for an axis of the plan that divides what a mixer or an arrangement needs whole, for rematerialisation of
    layers that keep nothing, and for weights that would come layer by layer to layers that run together."""
    if any(layer.arrangement.reversible for layer in (*spec.layers, *spec.encoder)):
        if plan.remat != "none":
            raise ConfigError("reversible layers keep nothing that plan.remat could recompute: leave it out")
        if plan.offload_weights != "none":
            raise ConfigError(
                f"plan.offload_weights {plan.offload_weights} does not go with reversible layers, which run together: leave it out"
            )
    for layer in (*spec.layers, *spec.encoder):
        for what, part in (("mixer", layer.mixer), ("arrangement", layer.arrangement)):
            for axis in sorted(part.undivided):
                if getattr(plan, axis) > 1:
                    free = [
                        f"--plan.{other}" for other in ("replicate", "shard", "pipeline") if other not in part.undivided
                    ]
                    raise ConfigError(
                        f"the {what} {part.registry.name_of(type(part))} does not go with plan.{axis}: "
                        f"{'use ' + ' or '.join(free) if free else 'train it in one process'}"
                    )

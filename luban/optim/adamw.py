"""AdamW (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luban.core.seeding import derive
from luban.kernels.available import triton_runs
from luban.kernels.stepped import Stepped
from luban.optim.base import DividedMatrices, Optimizer, OptimizerConfig, ParamGroups, Roles, Shapes, Update, vectors

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_adam(betas: tuple[float, float], eps: float) -> None:
    """Refuse settings under which Adam is undefined."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), {betas} given")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, {eps} given")


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay; matrices decay, vectors (norms, biases) do not."""

    rounds_stochastically = True
    elementwise = True
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    moments: Literal["fp32", "bf16"] = "fp32"  # how the moments are kept; bf16 is rounded stochastically

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Roles,
        divided: DividedMatrices | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Optimizer:
        plain, factors = vectors(roles), rates or {}
        grouped: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
        for name, parameter in parameters.items():
            grouped.setdefault((factors.get(name, 1.0), name not in plain), []).append(parameter)
        groups = [
            {
                "params": members,
                "peak_lr": self.lr * factor,
                "betas": self.betas,
                "eps": self.eps,
                "decay": self.weight_decay if matrices else 0.0,
            }
            for (factor, matrices), members in grouped.items()
        ]
        seeds = {parameter: derive(0, "adamw", name) % 2**31 for name, parameter in parameters.items()}
        return Optimizer([AdamWGroups(groups, MOMENTS[self.moments], seeds)], parameters)

    def workspace_bytes(self, shapes: Shapes, roles: Roles, *, widened: bool) -> int:
        """The fp32 copies of the gradients of all matrices or of all vectors."""
        sizes, plain = {True: 0, False: 0}, vectors(roles)
        for name, shape in shapes.items():
            sizes[name in plain] += 4 * math.prod(shape)
        return max(sizes.values()) if widened and self.moments == "fp32" else 0

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        return sum(2 * MOMENTS[self.moments].itemsize * math.prod(shape) + 4 for shape in shapes.values())


class AdamWGroups(ParamGroups):
    """Steps all tensors of a group: in fp32 by torch's fused kernel, on CUDA and in bf16 by one of our own."""

    def __init__(self, groups: Sequence[dict[str, Any]], moments: torch.dtype, seeds: Mapping[nn.Parameter, int]):
        super().__init__(groups)
        self.moments, self.seeds = moments, seeds

    def step(self, factor: float, update: Update) -> None:
        for group in self.groups:
            stepped = [p for p in group["params"] if p in update.gradients]
            if not stepped:
                continue
            for parameter in stepped:
                self._prepare(parameter)
            applied = update.apply.float()  # one for each: given one for all, torch would wait to read it
            torch._foreach_add_([self.state[p]["step"] for p in stepped], [applied] * len(stepped))
            wide = self.moments == torch.float32 and all(p.dtype in (torch.float32, torch.float64) for p in stepped)
            if wide and not update.gradients[stepped[0]].is_cuda:
                self._fused(group, stepped, group["peak_lr"] * factor, update)
            else:
                self._one_pass(group, stepped, group["peak_lr"] * factor, update)

    def _prepare(self, parameter: nn.Parameter) -> None:
        moments = torch.float64 if parameter.dtype == torch.float64 else self.moments
        if not self.state[parameter]:
            self.state[parameter].update(
                exp_avg=torch.zeros_like(parameter, dtype=moments),
                exp_avg_sq=torch.zeros_like(parameter, dtype=moments),
                step=torch.zeros((), device=parameter.device),
            )

    def _fused(self, group: dict[str, Any], stepped: Sequence[nn.Parameter], lr: float, update: Update) -> None:
        """torch's own kernel; on a CPU reading the switch costs nothing."""
        if not update.apply:
            return
        gradients = _scaled([update.gradients[p] for p in stepped], update.scale)
        state = [self.state[p] for p in stepped]
        torch._fused_adamw_(
            list[Tensor](stepped),
            gradients,
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        refresh(stepped, update)

    def _one_pass(self, group: dict[str, Any], stepped: list[nn.Parameter], lr: float, update: Update) -> None:
        if triton_runs(stepped[0]):
            from luban.kernels.adamw import adamw_
        else:
            from luban.kernels.reference.adamw import adamw_
        tensors = []
        for p in stepped:
            state = self.state[p]
            tensors.append(
                Stepped(
                    p,
                    update.gradients[p].contiguous(),
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["step"],
                    self.seeds[p],
                    update.copies.get(p),
                )
            )
        adamw_(
            tensors,
            scale=update.scale,
            apply=update.apply,
            lr=lr,
            decay=group["decay"],
            betas=group["betas"],
            eps=group["eps"],
        )


def _scaled(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """fp32 gradients times the factor: the same tensors, multiplied in place, where they are fp32 already."""
    wide = [g if g.dtype == torch.float64 else g.float() for g in gradients]
    if scale != 1:
        torch._foreach_mul_(wide, scale.to(wide[0].dtype))
    return wide


def refresh(stepped: Sequence[nn.Parameter], update: Update) -> None:
    """Copy fp32 weights to their half-precision copies, where there are such."""
    pairs = [(update.copies[p], p) for p in stepped if p in update.copies]
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [p for _, p in pairs])

"""Muon: momentum orthogonalised by Newton–Schulz (Jordan et al. 2024), scaled to AdamW's step size
(Liu et al. 2025, "Muon is scalable for LLM training", equation 4)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luban.optim.adamw import AdamW, check_adam, refresh
from luban.optim.base import (
    DividedMatrices,
    Optimizer,
    OptimizerConfig,
    ParamGroups,
    Roles,
    Shapes,
    Update,
    hidden_matrices,
)

# Quintic coefficients that drive singular values from [0, 1] to about 1 in five rounds (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Muon for the matrices inside the blocks; AdamW for embeddings, head, norms and biases."""

    lr: float = 5e-3  # peak learning rate of the hidden matrices, in AdamW's units (update RMS 0.2)
    momentum: float = 0.95  # decay of the momentum, Nesterov form
    rounds: int = 5  # Newton–Schulz rounds
    adamw_lr: float = 1e-2  # peak learning rate of everything else
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's, for everything else
    eps: float = 1e-8  # AdamW's, for everything else

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), {self.momentum} given")

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        roles: Roles,
        divided: DividedMatrices | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> Optimizer:
        names = hidden_matrices(roles)
        hidden = [p for name, p in parameters.items() if name in names]
        rest = {name: p for name, p in parameters.items() if name not in names}
        parts: list[ParamGroups] = []
        if hidden:
            parts.append(
                MuonGroups(
                    [
                        {
                            "params": hidden,
                            "peak_lr": self.lr,
                            "momentum": self.momentum,
                            "decay": self.weight_decay,
                            "rounds": self.rounds,
                        }
                    ],
                    {parameters[name]: name for name in names & parameters.keys()},
                    divided,
                )
            )
        if rest:
            adamw = AdamW(lr=self.adamw_lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
            parts += adamw.build(rest, {name: roles[name] for name in rest}, rates=rates).algorithms
        return Optimizer(parts, parameters)

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        hidden = hidden_matrices(roles)
        rest = {name: shape for name, shape in shapes.items() if name not in hidden}
        return 4 * sum(math.prod(shapes[name]) for name in hidden) + AdamW().state_bytes(rest, roles)

    def workspace_bytes(self, shapes: Shapes, roles: Roles, *, widened: bool) -> int:
        """Of the largest group of equal shapes: the mixtures of gradient and momentum one by one and stacked in fp32, three
        iterates in bf16."""
        sizes: dict[tuple[int, ...], int] = defaultdict(int)
        hidden = hidden_matrices(roles)
        for name in hidden:
            sizes[tuple(shapes[name])] += math.prod(shapes[name])
        rest = {name: shape for name, shape in shapes.items() if name not in hidden}
        return max(14 * max(sizes.values(), default=0), AdamW().workspace_bytes(rest, roles, widened=widened))

    def update_flops(self, shapes: Shapes, roles: Roles) -> int:
        """Newton–Schulz: three matmuls a round."""
        hidden = [sorted(shapes[name]) for name in hidden_matrices(roles)]
        return self.rounds * sum(4 * short**2 * long + 2 * short**3 for short, long in hidden)


class MuonGroups(ParamGroups):
    """The update itself. Matrices of one shape are orthogonalised together in one batched matmul.

    Momentum is kept where the weights are; of divided matrices each process gathers what is to be orthogonalised, computes all of
    it and keeps its part, so that the update is that of one process.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        divided: DividedMatrices | None = None,
    ):
        super().__init__(groups)
        self.names, self.divided = names, divided

    def step(self, factor: float, update: Update) -> None:
        for group in self.groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter in update.gradients:
                    by_shape[self._shape(parameter)].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters, factor, update)
                refresh(parameters, update)

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(parameter.shape) if self.divided is None else self.divided.shape(self.names[parameter])

    def _step_shape(
        self,
        group: dict[str, Any],
        shape: tuple[int, ...],
        parameters: list[nn.Parameter],
        factor: float,
        update: Update,
    ) -> None:
        kept, lr = update.apply.float(), group["peak_lr"] * factor
        mixtures = [self._mix(group["momentum"], parameter, kept, update) for parameter in parameters]
        if self.divided is not None:
            mixtures = [self.divided.whole(self.names[p], m) for p, m in zip(parameters, mixtures, strict=True)]
        precise = torch.float64 if parameters[0].dtype == torch.float64 else torch.bfloat16
        found = list(orthogonalise(torch.stack(mixtures), group["rounds"], precise))
        if self.divided is not None:
            found = [self.divided.part(self.names[p], whole) for p, whole in zip(parameters, found, strict=True)]
        size = -lr * 0.2 * math.sqrt(max(shape)) * kept
        weights = list[Tensor](parameters)
        torch._foreach_mul_(weights, 1 - lr * group["decay"] * kept)
        torch._foreach_add_(weights, [each.to(p.dtype) * size for p, each in zip(parameters, found, strict=True)])

    def _mix(self, decay: float, parameter: nn.Parameter, kept: Tensor, update: Update) -> Tensor:
        """Nesterov's mixture of a gradient and the momentum, which it updates: the part that is here."""
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if not self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=wide)
        momentum = self.state[parameter]["momentum"]
        gradient = update.gradients[parameter].to(wide) * update.scale.to(wide)
        gradient = torch.where(update.apply, gradient, 0.0)  # after a bad step the weight is 0 too
        momentum.lerp_(gradient, ((1 - decay) * kept).to(wide))
        return torch.lerp(gradient, momentum, decay)


def orthogonalise(matrices_NRC: Tensor, rounds: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replace each matrix U S Vᵀ by roughly U Vᵀ: singular values near 1 (within about 0.7 to 1.2).

    Args:
        matrices_NRC: (N, rows, columns), any floating dtype.
        rounds: Newton–Schulz rounds.
        dtype: the precision of the products.

    Returns:
        (N, rows, columns) in `dtype`.
    """
    a, b, c = QUINTIC
    x = matrices_NRC.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x

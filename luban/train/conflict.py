"""Whether tasks pull shared parameters in different directions: cosines between the gradients of their losses
(Du et al. 2018; Yu et al. 2020, "Gradient surgery for multi-task learning", definition 1)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from luban.core.seeding import generator
from luban.data.packing import Packing
from luban.parallel.engine import TrainEngine


class GradientConflict:
    """Measures on training rows drawn by the step; a measurement costs a forward and backward pass per task.

    Args:
        tasks: the rows of each.
        rows: drawn of each.
    """

    def __init__(self, tasks: Mapping[str, Packing], rows: int, seed: int):
        self.tasks, self.rows, self.seed = tasks, rows, seed

    def __call__(self, engine: TrainEngine, step: int) -> dict[str, float]:
        """`gradient_cosine/a/b` of every two tasks, over the parameters that both reach, and `gradient_norm/a` over all that
        task a reaches, of its mean loss."""
        found = {}
        for name, packing in self.tasks.items():
            draw = generator(self.seed, "conflict", name, step)
            rows = draw.integers(packing.rows, size=self.rows)
            found[name] = engine.gradients(packing.gather(rows))
        norms = {f"gradient_norm/{name}": dot(g, g) ** 0.5 for name, g in found.items()}
        return norms | {f"gradient_cosine/{a}/{b}": cosine(found[a], found[b]) for a, b in combinations(found, 2)}


def cosine(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Between gradients, over the parameters in which neither is 0; NaN where there are none."""
    shared = [name for name in one if name in two and bool(one[name].any()) and bool(two[name].any())]
    ours, theirs = ({name: gradients[name] for name in shared} for gradients in (one, two))
    lengths = (dot(ours, ours) * dot(theirs, theirs)) ** 0.5
    return dot(ours, theirs) / lengths if lengths else float("nan")


def dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """The scalar product over all names of `one`."""
    return float(sum((torch.sum(one[name].double() * two[name].double()) for name in one), torch.zeros(())))

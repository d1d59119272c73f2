"""What the routers of mixtures of experts need of a step, and what they did in it, over all processes.

B rows, T tokens, X experts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.data.batch import Batch
from luban.nn.moe.layer import MoELayer
from luban.nn.moe.routing import Tally


def routers_of(model: nn.Module) -> dict[str, MoELayer]:
    """Every mixture of experts in a model, by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MoELayer)}


@dataclass(frozen=True)
class Routers:
    """The mixtures of experts of a model.

    Args:
        experts: name of each in the whole model → X.
        layers: those that this process has.
        random: whether a router draws at random.
    """

    experts: Mapping[str, int]
    layers: Mapping[str, MoELayer]
    random: bool

    @classmethod
    def of(cls, experts: Mapping[str, int], model: nn.Module) -> Routers:
        """Of this process's model, which may be a stage of the one that `experts` describes."""
        layers = routers_of(model)
        return cls(dict(experts), layers, any(layer.choice.random for layer in layers.values()))

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """Arrays for `luban.objectives.base.router_training`, with the rows first.

        Rows weigh as their targets do in the loss: "router_weights" are their numbers of targets, still to be divided by those of
        the whole step. Random numbers follow from a row's tokens alone, so that they are the same under every plan, for
        any part of a batch, and in every recomputation.
        """
        if not self.experts:
            return {}
        rows, tokens = batch.tokens.shape[:2]
        found = {"router_weights": batch.loss_mask.reshape(rows, -1).sum(1).astype(np.float64)}
        if self.random:
            seeds = [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in batch.tokens]
            found["router_noise"] = np.stack([np.random.default_rng(seed).random(tokens) for seed in seeds])
        return found

    def figures(self, like: Tensor) -> list[Tensor]:
        """This process's tallies since the last call, in the order of `experts`, each a vector; zeros for other stages' layers."""
        found = []
        for name, experts in self.experts.items():
            taken = self.layers[name].tally.take() if name in self.layers else None
            found.append(like.new_zeros(experts + Tally.FIGURES) if taken is None else taken.to(like))
        return found

    def metrics(self, summed: Sequence[float]) -> dict[str, float]:
        """For `metrics.jsonl`, from sums over all processes: the highest load of an expert over the mean, of the worst layer and on
        average; the share of choices that were dropped; the losses' means over layers, without their factors."""
        if not self.experts:
            return {}
        at, loads, choices, dropped, losses = 0, [], 0.0, 0.0, []
        for experts in self.experts.values():
            counts = summed[at : at + experts]
            total, lost, balance, z_loss, weight = summed[at + experts : at + experts + Tally.FIGURES]
            at += experts + Tally.FIGURES
            loads.append(max(counts) * experts / max(sum(counts), 1))
            choices, dropped = choices + total, dropped + lost
            losses.append((balance / (weight or 1), z_loss / (weight or 1)))
        layers = len(loads)
        return {
            "expert_load_max": max(loads),
            "expert_load_mean": sum(loads) / layers,
            "expert_dropped": dropped / max(choices, 1),
            "balance_loss": sum(balance for balance, _ in losses) / layers,
            "router_z_loss": sum(z_loss for _, z_loss in losses) / layers,
        }

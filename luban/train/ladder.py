"""Trains a ladder of models: the same recipe at growing widths, with tokens proportional to parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luban.core.config import Partial, merge
from luban.core.errors import ConfigError, TrainingError
from luban.core.log import read_metrics, warn
from luban.data.shards import Shards
from luban.models.config import ModelConfig
from luban.models.describe import describe
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe
from luban.train.start import choose_start

HEAD = 8  # width of an attention head
DEEPER = 16  # width a layer
FEWEST = 200  # steps below which warm-up and decay are much of a run, and losses follow no power of compute
BASE = 32  # width that the recipe's learning rate is for; it falls with the square root of the width


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A finished run of the ladder."""

    width: int
    layers: int
    parameters: int  # without the embedding
    tokens: int  # trained on
    flops: float  # 6·N·D
    loss: float  # on held-out text
    path: str


def require_width(width: int) -> None:
    """Raise ConfigError unless a width is a multiple of a head's."""
    if width < HEAD or width % HEAD:
        raise ConfigError(f"widths of a ladder are multiples of {HEAD}, {width} given")


def rung_recipe(recipe: Recipe, width: int, ratio: float) -> tuple[Recipe, int, int]:
    """(the recipe of one width, its layers, its parameters without the embedding).

    Args:
        ratio: tokens a parameter.

    Raises:
        ConfigError: the width isn't a multiple of a head.
    """
    require_width(width)
    layers = max(2, width // DEEPER)
    given: dict[str, Any] = {
        "width": width,
        "layers": layers,
        "layer": {"mixer": {"heads": width // HEAD, "kv_heads": width // HEAD}, "feedforward": {"width": 4 * width}},
    }
    model = Partial(ModelConfig, merge(recipe.model.given, given))
    changed = replace(recipe, model=model)
    spec = choose_start(changed, Shards.open(recipe.data.path, "train")).spec
    graph = describe(spec, batch=1, seq=8)
    parameters = sum(op.parameters for op in graph.ops if op.layer)
    batch = recipe.train.batch_size * recipe.train.seq_len
    steps = max(round(ratio * parameters / batch), 2)
    warmup = min(getattr(recipe.schedule, "warmup", 0), max(steps // 5, 1))
    schedule = replace(recipe.schedule, warmup=warmup) if hasattr(recipe.schedule, "warmup") else recipe.schedule
    train = replace(recipe.train, steps=steps)
    optim = replace(recipe.optim, lr=recipe.optim.lr * (BASE / width) ** 0.5)
    return replace(changed, train=train, optim=optim, schedule=schedule), layers, parameters


def climb(
    recipe: Recipe, out: Path, widths: list[int], ratio: float, say: Callable[[Rung], object] = lambda rung: None
) -> list[Rung]:
    """Train each width into a folder of its own; finished ones are read.

    Raises:
        TrainingError: a run has no held-out loss.
    """
    found = []
    recipes = [rung_recipe(recipe, width, ratio) for width in widths]  # all of them before the first is trained
    for width, (changed, layers, parameters) in zip(widths, recipes, strict=True):
        if changed.train.steps < FEWEST:
            warn(
                f"width {width} trains for {changed.train.steps} steps, too few for losses that follow a power of compute: use a larger "
                "--ratio, or a smaller --train.batch_size"
            )
        path = pretrain(changed, out / f"width-{width}", "ladder")
        held = [
            row["heldout_loss"] for row in read_metrics(path / "metrics.jsonl") if row.get("heldout_loss") is not None
        ]
        if not held:
            raise TrainingError(f"{path} has no held-out loss: the data need a held-out split")
        tokens = changed.train.steps * recipe.train.batch_size * recipe.train.seq_len
        rung = Rung(
            width=width,
            layers=layers,
            parameters=parameters,
            tokens=tokens,
            flops=6.0 * parameters * tokens,
            loss=held[-1],
            path=str(path),
        )
        found.append(rung)
        say(rung)
    return found

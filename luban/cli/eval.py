"""`luban eval MODEL TASK… --out DIR`: measure a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from luban.core.arguments import parse


@dataclass(frozen=True)
class Args:
    """Options."""

    model: Positional[str]  # a run, a checkpoint, or a Hugging Face directory
    tasks: Positional[tuple[str, ...]]  # bits_per_byte, answer_loss, which_module, samples, altered_sentence, chomsky
    out: Path  # the evaluation's directory
    corpus: tuple[Path, ...] = ()  # corpora whose held-out split is measured on
    limit: int = 0  # items a task at most (0: all)
    device: str = "auto"  # cpu, cuda, or auto
    precision: Literal["float32", "bfloat16"] = "float32"  # arithmetic


def run(argv: Sequence[str]) -> None:
    """Measure, print the figures, write the evaluation artifact."""
    args = parse(
        Args,
        argv,
        verb="eval",
        about="Measure a model on held-out text and questions.",
        examples="luban eval runs/a bits_per_byte --corpus corpus --out runs/eval\n"
        "luban eval runs/sft answer_loss which_module samples --corpus questions --out runs/eval-sft",
    )
    from luban.evals.run import evaluate

    figures = evaluate(
        args.model,
        args.tasks,
        args.out,
        corpora=args.corpus,
        limit=args.limit,
        device=args.device,
        precision=args.precision,
    )
    for name, value in figures.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")

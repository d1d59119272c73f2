"""`luban scaling`: scaling laws fitted to finished runs, and the best model for a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from luban.core.arguments import parse
from luban.core.errors import DataError, UsageError
from luban.core.units import count

if TYPE_CHECKING:
    from luban.scaling.chinchilla import Chinchilla

EXAMPLES = """
luban scaling runs.csv
luban scaling runs.csv --budget 1e21 5.76e23 --json
luban scaling runs.csv --parameters 7e9 --tokens 2e12
luban scaling chinchilla.csv --drop-highest 5 --resamples 1000
luban scaling ladder luban_ladder_cpu --data.path shards --out runs/ladder    # trains small models and checks the next size
luban scaling emergence luban_emergence_gpu --out runs/emergence    # trains small models and shows what grows with size
"""
ABOUT = (
    "Scaling laws fitted to finished runs. FILE.csv has a column loss and two of parameters, tokens and flops (also N, D, C, "
    "Model Size, Training FLOP); the third follows from C = 6·N·D."
)


@dataclass(frozen=True)
class Args:
    """Options."""

    file: Positional[Path]  # one run a row
    budget: tuple[float, ...] = ()  # FLOPs: the best N and D for each
    parameters: float | None = None  # with --tokens: the loss that the fit predicts
    tokens: float | None = None  # with --parameters
    # leave out this many runs, those with the highest losses; by default runs far from the fit are left out
    drop_highest: int | None = None
    resamples: int = 200  # of the bootstrap that gives the 95% intervals
    seed: int = 0  # of the bootstrap
    json: bool = False  # machine-readable


def run(argv: Sequence[str]) -> None:
    """Fit and print; `ladder` trains runs to fit, `emergence` runs that are evaluated."""
    if argv and argv[0] in ("ladder", "emergence"):
        from luban.cli import scaling_emergence, scaling_ladder

        (scaling_ladder if argv[0] == "ladder" else scaling_emergence).run(argv[1:])
        return
    args = parse(Args, argv, verb="scaling", about=ABOUT, examples=EXAMPLES)
    _check(args)
    found = _fitted(args)
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(found, args)))


def _check(args: Args) -> None:
    if (args.parameters is None) != (args.tokens is None):
        raise UsageError("a loss is predicted for --parameters and --tokens: give both")
    for name in ("parameters", "tokens", "budget"):
        given = getattr(args, name)
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"--{name} is a number above 0, not {value}")
    if args.resamples < 20:
        raise UsageError(f"--resamples is at least 20 for a 95% interval, not {args.resamples}")
    if args.drop_highest is not None and args.drop_highest < 0:
        raise UsageError(f"--drop-highest is a number of runs from 0, not {args.drop_highest}")


def _fitted(args: Args) -> dict[str, Any]:
    import numpy as np

    from luban.scaling.chinchilla import ChinchillaForm
    from luban.scaling.fitting import bootstrap, centres, fit, without_outliers
    from luban.scaling.kaplan import KaplanForm
    from luban.scaling.observations import read_observations

    runs, form = read_observations(args.file), ChinchillaForm()
    if args.drop_highest is None:
        kept = without_outliers(form, runs)
    else:
        kept = np.ones(len(runs), dtype=bool)
        kept[np.argsort(runs.loss)[len(runs) - args.drop_highest :]] = False
    used = runs[kept]
    theta, middle = fit(form, used), centres(used)
    law = form.constants(theta, *middle)
    samples = [
        form.constants(sample, *middle)
        for sample in bootstrap(form, used, theta, resamples=args.resamples, seed=args.seed)
    ]
    names = (*asdict(law), "a")
    result: dict[str, Any] = {name: getattr(law, name) for name in names}
    result["intervals"] = {name: _interval([getattr(s, name) for s in samples]) for name in names}
    result["runs"], result["left_out_lines"] = len(used), [int(line) for line in runs.lines[~kept]]
    result["kaplan"] = asdict(KaplanForm().constants(fit(KaplanForm(), used), *middle))
    result["approaches"] = _approaches(used, law)
    result["optimum"] = [_optimum(law, samples, flops) for flops in args.budget]
    if args.parameters is not None and args.tokens is not None:
        losses = [s.loss(args.parameters, args.tokens) for s in samples]
        loss = law.loss(args.parameters, args.tokens)
        sizes = {"parameters": args.parameters, "tokens": args.tokens}
        result["predicted"] = {**sizes, "loss": loss, "interval": _interval(losses)}
    return result


def _interval(values: Sequence[float]) -> list[float]:
    import numpy as np

    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


def _approaches(runs: Any, law: Chinchilla) -> dict[str, Any]:
    """Exponent a by each of Hoffmann's three approaches; a reason where one can't be used."""
    from luban.scaling.frontier import envelope, isoflop

    found: dict[str, Any] = {}
    for name, approach in (("envelope", envelope), ("isoflop", isoflop)):
        try:
            line = approach(runs)
            found[name] = {"a": line.a, "b": 1 - line.a, "factor": line.factor, "points": len(line.flops)}
        except DataError as error:
            found[name] = {"a": None, "reason": str(error)}
    return {**found, "parametric": {"a": law.a, "b": 1 - law.a}}


def _optimum(law: Chinchilla, samples: Sequence[Chinchilla], flops: float) -> dict[str, Any]:
    rows = [asdict(sample.optimum(flops)) for sample in samples]
    names = ("parameters", "tokens", "loss")
    return {**asdict(law.optimum(flops)), "intervals": {name: _interval([row[name] for row in rows]) for name in names}}


def _lines(found: dict[str, Any], args: Args) -> list[str]:
    lines = [f"L(N, D) = E + A/N^alpha + B/D^beta, fitted to {found['runs']} runs (95% intervals):"]
    for name, (low, high) in found["intervals"].items():
        about = "  (best N ∝ C^a)" if name == "a" else ""
        lines.append(f"  {name:<6} {found[name]:>10.4g}   {low:.4g} to {high:.4g}{about}")
    if found["left_out_lines"]:
        why = "the highest losses" if args.drop_highest else "far from the fit"
        lines.append(f"left out, {why}: lines {', '.join(map(str, found['left_out_lines']))} of {args.file}")
    for name, row in found["approaches"].items():
        lines.append(f"a by {name:<11}" + (f"{row['a']:.3f}" if row["a"] is not None else f"none: {row['reason']}"))
    kaplan = found["kaplan"]
    lines.append(
        f"Kaplan's form: Nc {kaplan['Nc']:.3g}, Dc {kaplan['Dc']:.3g}, alpha_N {kaplan['alpha_n']:.4f}, "
        f"alpha_D {kaplan['alpha_d']:.4f}"
    )
    for row in found["optimum"]:
        low, high = row["intervals"]["parameters"]
        lines.append(
            f"{row['flops']:.3g} FLOPs: best {count(row['parameters'])} parameters ({count(low)} to {count(high)}), "
            f"{count(row['tokens'])} tokens, loss {row['loss']:.4f}"
        )
    if "predicted" in found:
        row = found["predicted"]
        low, high = row["interval"]
        lines.append(
            f"{count(row['parameters'])} parameters, {count(row['tokens'])} tokens: loss {row['loss']:.4f} "
            f"({low:.4f} to {high:.4f})"
        )
    return lines

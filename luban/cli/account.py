"""`luban account`: FLOPs, GPU-hours, utilisation, money, energy and carbon of a run; training compute since 1950."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luban.core.arguments import parse, refuse_flags
from luban.core.errors import UsageError
from luban.core.log import print_result
from luban.core.units import count
from luban.planner.accelerators import accelerator
from luban.planner.accounting.account import (
    Account,
    Assumptions,
    account,
    assumptions,
    constants,
    published_runs,
    training_flops,
)
from luban.planner.accounting.history import BREAKS, TABLE, TrainedSystem, Trend, read_history, trends

EXAMPLES = """
luban account --gpu-hours 1720320 --gpu a100-80gb --model llama2-70b --tokens 2e12 --price 20 --currency yuan
luban account --model llama-7b --tokens 1e12 --gpu h100-sxm --utilisation 0.4 --json
luban account --parameters 13e9 --tokens 2e12 --gpu-hours 368640
luban account --published
luban account --history --picture compute.svg
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Options."""

    gpu_hours: float | None = None  # of all GPUs together
    gpu: str = "a100-80gb"  # which GPU: a row of the table of accelerators
    model: str | None = None  # a model by its preset's name: counts its parameters
    parameters: float | None = None  # instead of --model
    tokens: float | None = None  # that the model is trained on
    utilisation: float | None = None  # model FLOPs over peak FLOPs, 0 to 1, where hours or FLOPs are to be found
    price: float | None = None  # of one GPU-hour
    currency: str = "USD"  # that the price is in
    watts: float | None = None  # of one GPU, instead of its power limit
    pue: float | None = None  # energy of the data centre over that of its GPUs
    carbon_intensity: float | None = None  # kg of CO₂ equivalent a kWh
    published: bool = False  # LLaMA's and Llama 2's tables computed, beside what their papers print
    history: bool = False  # training compute since 1950 with doubling times
    data: Path | None = None  # with --history: a CSV file of your own (date, system, flop or log10_flop, source)
    breaks: tuple[float, ...] = BREAKS  # with --history: years in which an era ends and the next begins
    picture: Path | None = None  # with --history: an SVG file to write
    json: bool = False  # machine-readable


def run(argv: Sequence[str]) -> None:
    """Print the account, the published tables or the history."""
    args = parse(
        Args,
        argv,
        verb="account",
        about="What a training run takes: FLOPs, GPU-hours, utilisation, money, energy, carbon.",
        examples=EXAMPLES,
    )
    if not args.history:
        refuse_flags(argv, ("data", "picture"), "without --history")
    if args.history:
        _history(args)
    elif args.published:
        _published(args)
    else:
        _account(args)


def _account(args: Args) -> None:
    gpu = accelerator(args.gpu)
    changes = {"watts": args.watts, "pue": args.pue, "carbon_intensity": args.carbon_intensity}
    assumed = assumptions(gpu, **changes, price_per_hour=args.price)
    parameters = _parameters(args)
    flops = None if parameters is None else training_flops(parameters, args.tokens)  # type: ignore[arg-type]
    if flops is None and args.gpu_hours is None:
        raise UsageError("luban account needs --gpu-hours, or --model (or --parameters) with --tokens")
    found = account(gpu, assumed, flops=flops, gpu_hours=args.gpu_hours, utilisation=args.utilisation)
    if args.json:
        rest = {"gpu": args.gpu, "parameters": parameters, "tokens": args.tokens, "currency": args.currency}
        print(json.dumps({**asdict(found), **rest, "assumptions": asdict(assumed)}, indent=2, ensure_ascii=False))
        return
    print("\n".join(_lines(found, assumed, args, parameters)))


def _parameters(args: Args) -> float | None:
    if args.model is not None and args.parameters is not None:
        raise UsageError("give --model or --parameters, not both")
    parameters = args.parameters
    if args.model is not None:
        from luban.models.describe import describe
        from luban.models.presets import preset

        parameters = describe(preset(args.model), batch=1, seq=1).active_parameters
    if (parameters is None) != (args.tokens is None):
        what = "--tokens" if args.tokens is None else "--model (or --parameters)"
        raise UsageError(f"FLOPs are 6 · parameters · tokens: {what} is missing")
    for name, value in (("--parameters", parameters), ("--tokens", args.tokens)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} is a number above 0, not {value}")
    return parameters


def _lines(found: Account, assumed: Assumptions, args: Args, parameters: float | None) -> list[str]:
    row = accelerator(args.gpu)
    formula = (
        f" (6 · {count(parameters)} parameters · {count(args.tokens)} tokens)" if parameters and args.tokens else ""
    )
    note = f", assumed: {constants()['utilisation'].source}" if found.utilisation_assumed else ""
    lines = [
        f"FLOPs          {found.flops:.4g}{formula}",
        f"GPU-hours      {found.gpu_hours:,.0f} of {row.names[0]}",
        f"utilisation    {found.utilisation:.1%} of {row.peak['bf16']:g} TFLOP/s{note}",
        f"energy         {found.energy_mwh:,.2f} MWh ({assumed.watts:g} W a GPU, PUE {assumed.pue:g})",
        f"carbon         {found.carbon_tonnes:,.2f} t of CO₂ equivalent ({assumed.carbon_intensity:g} kg a kWh)",
        f"               as {found.people_years:,.1f} people emit in a year ({assumed.person:g} t each), or "
        f"{found.trees:,.0f} trees take up in a year ({1000 * assumed.tree:g} kg each)",
    ]
    if found.price is not None:
        lines.append(f"price          {_money(found.price, args)} ({_money(args.price or 0, args)} a GPU-hour)")
    point, percent = found.point_saves.percentage_point, found.point_saves.one_percent
    raised = f"{found.utilisation:.1%} → {found.utilisation + 0.01:.1%}"
    for what, saving in ((f"one percentage point of utilisation ({raised})", point), ("1% fewer GPU-hours", percent)):
        money = "" if saving.price is None else f", {_money(saving.price, args)}"
        lines.append(f"a point saves  {saving.gpu_hours:,.0f} GPU-hours{money}: {what}")
    return lines


def _money(amount: float, args: Args) -> str:
    return f"{amount:,.0f} {args.currency}" if amount >= 100 else f"{amount:,.4g} {args.currency}"


def _published(args: Args) -> None:
    gpu, rows = accelerator("a100-80gb"), []
    for name, run_ in published_runs().items():
        assumed = assumptions(gpu, watts=run_.watts, pue=args.pue, carbon_intensity=args.carbon_intensity)
        found = account(gpu, assumed, flops=training_flops(run_.parameters, run_.tokens), gpu_hours=run_.gpu_hours)
        rows.append((name, run_, found))
    if args.json:
        table = [{"model": name, **asdict(found), "published": asdict(run_)} for name, run_, found in rows]
        print(json.dumps(table, indent=2, ensure_ascii=False))
        return
    print(f"{'model':<12}{'GPU-hours':>11}{'utilisation':>13}{'MWh':>9}{'printed':>9}{'t CO₂e':>9}{'printed':>9}")
    for name, run_, found in rows:
        printed = "" if run_.mwh is None else f"{run_.mwh:g}"
        print(
            f"{name:<12}{found.gpu_hours:>11,.0f}{found.utilisation:>13.1%}{found.energy_mwh:>9.2f}{printed:>9}"
            f"{found.carbon_tonnes:>9.2f}{run_.tonnes:>9g}"
        )


def _history(args: Args) -> None:
    systems = read_history(args.data or TABLE)
    eras = trends(systems, args.breaks)
    if args.picture:
        from luban.report.training_compute import draw_history

        args.picture.write_text(draw_history(systems, eras), encoding="utf-8")
    if args.json:
        print(json.dumps(_history_json(systems, eras), indent=2, ensure_ascii=False))
        return
    for system in systems:
        print(f"{system.date}  {system.flops:8.1e} FLOPs  {system.name}")
    print()
    for era in eras:
        low, high = era.doubling_interval
        print(
            f"{int(era.start)} to {int(era.end)}: doubles every {era.doubling_months:.1f} months "
            f"(95% interval {low:.1f} to {high:.1f}; {era.systems} systems)"
        )
    if args.picture:
        print_result(args.picture)


def _history_json(systems: Sequence[TrainedSystem], eras: Sequence[Trend]) -> dict[str, Any]:
    rows = [{"date": s.date.isoformat(), "system": s.name, "flops": s.flops, "source": s.source} for s in systems]
    return {"systems": rows, "trends": [asdict(era) for era in eras]}

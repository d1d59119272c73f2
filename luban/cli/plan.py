"""`luban plan RECIPE --cluster FILE`: the best plans for a model on a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luban.core.arguments import parse_recipe, refuse_flags
from luban.core.config import to_toml
from luban.core.errors import UsageError
from luban.core.log import print_result, say
from luban.core.units import bytes_, count, milliseconds

if TYPE_CHECKING:
    from luban.planner.cluster import Cluster
    from luban.planner.search.estimate import Estimate
    from luban.planner.search.learnt import Error
    from luban.train.planning import Planned

ABOUT = """Search how a recipe's model should be spread over a cluster: step time, memory a GPU, waiting, communication, price and energy
of the best plans, by arithmetic over the model's operations. The fastest that fits and that luban pretrain can run goes to --out.

--cluster FILE     gpu, nodes, gpus_per_node, links, price: docs/PLANNING.md
--top N            plans to show (8); the price and the energy are those of train.steps
--out FILE         the chosen plan, for luban pretrain RECIPE --plan FILE
--search alpa      shardings inside of stages by integer programming and stages by dynamic programming (luban[plan])
--micro-batches N  of that search; by default those with 8, 16 and 32 rows are tried
--prices WAY       of messages between nodes: closed (closed form, the default), fluid (max-min fair rates of luban simulate over a
                   network, by which the plans are ordered), or packets (the chosen plan's also packet by packet, beside both)
--network NAME     a scenario of luban simulate, by path or shipped name, whose network, transport and switches these are; by
                   default the cluster file's topology
--explain          one layer through the compiler passes: fused, sharded, with its collectives
--runs DIR …       finished runs, from whose predictions and measurements the error bars are learnt
--picture FILE     where the time of each plan goes, as SVG; of --search alpa that of the plan that luban pretrain runs
--json             everything as JSON
The model's vocabulary is that of --data.path where it is given."""
USAGE = (
    "RECIPE --cluster FILE [--top N] [--prices closed|fluid|packets] [--network FILE|NAME] [--out FILE] [--runs DIR …] "
    "[--picture FILE] [--json] [--section.field value …]"
)
EXAMPLES = """
luban plan luban_pretrain_gpu --cluster cluster.toml
luban plan luban_pretrain_gpu --cluster cluster.toml --model.preset llama2-70b --train.batch_size 1024 --train.seq_len 4096
luban plan luban_pretrain_gpu --cluster cluster.toml --search alpa --model.preset gpt3-175b --train.batch_size 1536
luban plan luban_pretrain_gpu --cluster cluster.toml --explain
luban plan luban_pretrain_gpu --cluster cluster.toml --prices packets --network hcc
luban plan luban_pretrain_gpu --cluster cluster.toml --out plan.toml --picture plan.svg --runs runs/a runs/b
luban pretrain luban_pretrain_gpu --plan plan.toml --data.path shards --out runs/c
"""


TOP = 8  # plans that are shown
VALUED = ("cluster", "top", "out", "picture", "search", "micro-batches", "prices", "network")  # options with a value


@dataclass(frozen=True, kw_only=True)
class Options:
    """The verb's own options."""

    cluster: Path
    top: int | None = None
    out: Path | None = None
    picture: Path | None = None
    runs: tuple[Path, ...] = ()
    json: bool = False
    search: str = "all"
    micro_batches: int | None = None
    explain: bool = False
    prices: str = "closed"
    network: str | None = None


def _refuse_unused(options: Options, argv: Sequence[str]) -> None:
    """Raise UsageError for flags that would do nothing."""
    if options.prices == "closed":
        refuse_flags(argv, ("network",), "without --prices fluid or packets")
    if options.search == "alpa":
        refuse_flags(argv, ("top",), "with --search alpa, which finds one plan")
        if options.prices != "closed":
            refuse_flags(argv, ("prices",), "with --search alpa, whose prices are closed")
    else:
        refuse_flags(argv, ("micro_batches",), "without --search alpa: all numbers are tried")


def run(argv: Sequence[str]) -> int:
    """Search and print."""
    from luban.cli.training import RECIPES
    from luban.train.recipe import Recipe

    helped = not argv or "--help" in argv or "-h" in argv
    options, rest = (None, list(argv)) if helped else _split(argv)
    if given := [word for word in rest if word.startswith("--plan")]:
        raise UsageError(f"luban plan searches the plan, so leave {given[0]} out")
    call = parse_recipe(
        Recipe, [*rest, "--dry-run"], verb="plan", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, usage=USAGE
    )
    assert options is not None
    from luban.planner.cluster import read_cluster
    from luban.planner.search.learnt import learnt
    from luban.planner.search.plans import best_plans
    from luban.train.planning import planned

    cluster = read_cluster(options.cluster)
    table = cluster.table(options.cluster.parent)
    problem = planned(call.recipe, cluster, table)
    error = learnt(options.runs, table.error, cluster.row)
    if options.search == "alpa":
        return _alpa(options, problem, cluster, argv, error, call.recipe.train.steps)
    found, prices = best_plans(problem.space, problem.workload, cluster, options.top or TOP), None
    if options.prices != "closed":
        from luban.cli.plan_prices import network_of, priced

        found, problem, prices = priced(found, problem, network_of(options.network, cluster), options.prices)
    chosen = next((each for each in found if problem.refusal(each) is None), None)
    steps = call.recipe.train.steps
    rows = [_row(each, problem, cluster, steps, error) for each in found]
    if options.picture is not None:
        from luban.report.plans import draw_plans

        options.picture.write_text(draw_plans(found), encoding="utf-8")
    if options.out is not None:
        _write(options.out, chosen, argv, error)
    if options.json:
        best = None if chosen is None else found.index(chosen)
        about = {
            "gpu": cluster.gpu,
            "gpus": cluster.gpus,
            "table": table.source,
            "currency": cluster.currency,
            "steps": steps,
        }
        about["prices"] = None if prices is None else prices.as_json()
        print_result(json.dumps({"plans": rows, "chosen": best, **about}, indent=2, ensure_ascii=False))
        return 0
    print("\n".join(_lines(rows, cluster, table.source, problem, error, steps)))
    if prices is not None and chosen is not None:
        print("\n".join(prices.lines(found.index(chosen) + 1)))
    if options.explain:
        from luban.cli.plan_alpa import explanation

        best = found[0].candidate
        print(
            "\n" + "\n".join(explanation(problem, best.plan.readers, best.plan.tensor, best.rows * best.plan.readers))
        )
    if options.out is not None:
        print_result(options.out)
    if options.picture is not None:
        print_result(options.picture)
    return 0


def _split(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The verb's own options, and the words of the recipe."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word in ("--json", "--explain"):
            found[key] = True
        elif word == "--runs":
            runs = []
            while words and not words[0].startswith("--"):
                runs.append(Path(words.pop(0)))
            found["runs"] = tuple(runs)
        elif word.startswith("--") and key in VALUED:
            if not equals and not words:
                raise UsageError(f"--{key} needs a value")
            text = value if equals else words.pop(0)
            found[key.replace("-", "_")] = _option(key, text)
        else:
            rest.append(word)
            if word.startswith("--") and not equals and words:
                rest.append(words.pop(0))
    if "cluster" not in found:
        raise UsageError("luban plan needs --cluster FILE (see luban plan --help and docs/PLANNING.md)")
    options = Options(**found)
    _refuse_unused(options, argv)
    return options, rest


def _option(key: str, text: str) -> Any:
    """The value of one of the verb's own options."""
    if key == "search":
        if text not in ("all", "alpa"):
            raise UsageError(f"--search is all or alpa, {text!r} given")
        return text
    if key == "prices" and text not in ("closed", "fluid", "packets"):
        raise UsageError(f"--prices is closed, fluid or packets, {text!r} given")
    if key in ("prices", "network"):
        return text
    if key in ("top", "micro-batches"):
        if not text.isdecimal() or int(text) < 1:
            raise UsageError(f"--{key} takes a number from 1, {text!r} given")
        return int(text)
    return Path(text)


def _alpa(options: Options, problem: Planned, cluster: Cluster, argv: Sequence[str], error: Error, steps: int) -> int:
    """Alpa's searches instead of every plan."""
    from luban.cli.plan_alpa import as_json, explanation, lines, search
    from luban.planner.search.estimate import Candidate
    from luban.planner.search.plans import described
    from luban.planner.sharding.alpa import as_plan
    from luban.report.plans import draw_plans

    found = search(problem, cluster, options.micro_batches)
    plan, reasons = as_plan(found, len(problem.workload.model.kind_of))
    data, model, _ = found.variants[0]
    estimate = None
    if plan is not None:
        rows = found.rows // plan.readers
        estimate = problem.workload.estimate(Candidate(plan=plan, accumulate=found.micro_batches, rows=rows))
        reasons += [text for text in [problem.refusal(estimate)] if text]
    elif options.picture is not None:
        raise UsageError(
            "--picture draws the plan that luban pretrain runs, and it can't run what was found: leave --search alpa out"
        )
    row = None if estimate is None else _row(estimate, problem, cluster, steps, error)
    if options.json:
        print_result(json.dumps({**as_json(found, plan, reasons), "plan": row}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(lines(found, plan, reasons)))
        if estimate is not None:
            print(
                f"as luban pretrain runs it: {described(estimate.candidate)}: {milliseconds(error.factor * estimate.seconds)} a step "
                f"with sums of gradients and the update, {bytes_(estimate.memory)} a GPU (by the costs of luban plan without --search "
                "alpa, which may find a faster plan)"
            )
    if options.explain:
        print("\n" + "\n".join(explanation(problem, data, model, found.rows)))
    if options.out is not None:
        _write(options.out, estimate, argv, error)
        print_result(options.out)
    if options.picture is not None and estimate is not None:
        options.picture.write_text(draw_plans([estimate]), encoding="utf-8")
        print_result(options.picture)
    return 0


def _row(estimate: Estimate, problem: Planned, cluster: Cluster, steps: int, error: Error) -> dict[str, Any]:
    """A plan's figures."""
    from luban.train.planning import settings_of

    seconds = error.factor * estimate.seconds
    hours = steps * seconds / 3600
    peak = cluster.row.peak_flops("bf16")
    return {
        **settings_of(estimate),
        "rows": estimate.candidate.rows,
        "step_seconds": seconds,
        "step_seconds_interval": [low_or_high * estimate.seconds for low_or_high in error.interval],
        "memory_bytes": estimate.memory,
        "bubble": estimate.bubble,
        "communication": estimate.messages,
        "tokens_per_second": problem.workload.batch * problem.workload.seq / seconds,
        "mfu": estimate.model_flops / seconds / cluster.gpus / peak,
        "gpu_hours": hours * cluster.gpus,
        "price": None if cluster.price is None else hours * cluster.gpus * cluster.price,
        "energy_mwh": hours * cluster.gpus * cluster.row.power * cluster.pue / 1e6,
        "refused": problem.refusal(estimate),
    }


def _lines(
    rows: list[dict[str, Any]], cluster: Cluster, source: str, problem: Planned, error: Error, steps: int
) -> list[str]:
    parameters = problem.workload.model.graph.parameters
    lines = [
        f"{count(parameters)} parameters, {problem.workload.batch} rows of {problem.workload.seq} tokens a step, on "
        f"{cluster.gpus} × {cluster.gpu} ({bytes_(cluster.memory_bytes)} each)",
        state_by_zero(parameters, cluster.gpus),
        f"table: {source}",
        f"step times {error}",
        f"{'energy' if cluster.price is None else f'price, in {cluster.currency}, and energy'}: of the run's {steps:,} steps",
        "",
        f"{'':>3} {'tp':>3} {'cp':>3} {'pp':>3} {'shard':>6} {'copies':>6} {'ep':>3} {'zero':>4} {'micro':>9} {'remat':>9} "
        f"{'step':>10} {'MFU':>6} {'memory':>8} {'bubble':>7} {'sends':>6} {'price':>10} {'energy':>9}",
    ]
    for number, row in enumerate(rows, 1):
        plan = {
            "tensor": 1,
            "context": 1,
            "pipeline": 1,
            "shard": 1,
            "replicate": 1,
            "expert": 1,
            "zero": 3,
            **row["plan"],
        }
        micro = max(plan.get("microbatches", 1), row["train"]["accumulate"])
        price = "" if row["price"] is None else f"{count(float(row['price']))}"
        lines.append(
            f"{number:>3} {plan['tensor']:>3} {plan['context']:>3} {plan['pipeline']:>3} {plan['shard']:>6} "
            f"{plan['replicate']:>6} {plan['expert']:>3} {plan['zero'] if plan['shard'] > 1 else '–':>4} "
            f"{micro:>5}×{row['rows']:<3} {plan.get('remat', 'none'):>9} {milliseconds(row['step_seconds']):>10} "
            f"{row['mfu']:>6.1%} {bytes_(row['memory_bytes']):>8} {row['bubble']:>7.1%} {row['communication']:>6.1%} "
            f"{price:>10} {_energy(row['energy_mwh']):>9}{' *' * (row['refused'] is not None)}"
        )
    lines += [f"{'':>3} * {number}: {row['refused']}" for number, row in enumerate(rows, 1) if row["refused"]]
    return lines


def state_by_zero(parameters: int, gpus: int) -> str:
    """Bytes of weights, gradients and optimizer state of a GPU, undivided and at each stage of ZeRO, at the published 16 bytes a
    parameter (Rajbhandari et al. 2020, figure 1)."""
    from luban.planner.search.estimate import zero_bytes

    sizes = [bytes_(zero_bytes(parameters, gpus, stage)) for stage in range(4)]
    divided = ", ".join(f"{size} with ZeRO {stage}" for stage, size in enumerate(sizes[1:], 1))
    return f"weights, gradients and Adam's state a GPU, at 2 + 2 + 12 bytes a parameter: {sizes[0]} whole, {divided}"


def _energy(mwh: float) -> str:
    """As people read it: 0.0343 → '34.3 kWh'."""
    for size, unit in ((1.0, "MWh"), (1e-3, "kWh")):
        if mwh >= size:
            return f"{mwh / size:.3g} {unit}"
    return f"{mwh * 1e6:.3g} Wh"


def _write(out: Path, chosen: Estimate | None, argv: Sequence[str], error: Error) -> None:
    """The chosen plan as a file for --plan."""
    import shlex

    from luban.planner.search.plans import described
    from luban.train.planning import settings_of

    if chosen is None:
        raise UsageError("luban pretrain can't run what was found: raise --top, or leave --search alpa out")
    figures = {"step_seconds": error.factor * chosen.seconds, "memory_bytes": round(chosen.memory)}
    text = f"# luban plan {shlex.join(argv)}\n# {described(chosen.candidate)}\n\n"
    out.write_text(text + to_toml({**settings_of(chosen), "predicted": figures}), encoding="utf-8")
    say(f"{chosen.candidate.plan.processes} processes: {described(chosen.candidate)}")

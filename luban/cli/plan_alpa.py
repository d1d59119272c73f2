"""`luban plan --search alpa` and `--explain`: shardings and stages found by Alpa's searches, and passes over one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luban.core.units import milliseconds

if TYPE_CHECKING:
    from luban.core.plan import ParallelPlan
    from luban.planner.cluster import Cluster
    from luban.planner.sharding.alpa import Found
    from luban.train.planning import Planned

MICRO_ROWS = (8, 16, 32)  # rows of a micro-batch that are tried, over all devices of a stage


def search(problem: Planned, cluster: Cluster, micro_batches: int | None) -> Found:
    """The best of the numbers of micro-batches that are tried."""
    from luban.core.errors import UnsupportedError
    from luban.planner.search.plans import best_plans, described
    from luban.planner.sharding.alpa import Search

    batch = problem.workload.batch
    numbers = [micro_batches] if micro_batches else [batch // rows for rows in MICRO_ROWS if batch % rows == 0] or [1]
    found, refused = [], None
    for number in numbers:
        try:
            found.append(Search(problem.workload, cluster, number).run())
        except UnsupportedError as error:
            refused = error
    if not found:
        other = best_plans(problem.space, problem.workload, cluster, 1)[
            0
        ].candidate  # raises, with what would do, if none fits
        raise UnsupportedError(f"{refused}; leave --search alpa out, which finds {described(other)}")
    return min(found, key=lambda each: each.seconds)


def lines(found: Found, plan: ParallelPlan | None, reasons: list[str]) -> list[str]:
    """For people."""
    from luban.planner.sharding.alpa import cross_mesh

    rows = [
        f"Alpa: {len(found.stages.cuts)} stages, {found.micro_batches} micro-batches of {found.rows} rows, "
        f"{milliseconds(found.seconds)} a step without the update",
        f"{'stage':>7} {'layers':>9} {'GPUs':>5} {'data':>5} {'model':>5} {'recomputes':>10} {'micro-batch':>12}  to the next",
    ]
    for stage, ((_, _, number), (data, model, recomputes)) in enumerate(
        zip(found.stages.cuts, found.variants, strict=True)
    ):
        first, past = found.layers(stage)
        text = ""
        if stage + 1 < len(found.variants):
            senders, receivers, pieces = cross_mesh(found, stage)
            text = f"{senders} → {receivers} devices, {pieces} pieces"
        rows.append(
            f"{stage:>7} {f'{first}–{past - 1}':>9} {found.sizes[number]:>5} {data:>5} {model:>5} "
            f"{'yes' if recomputes else 'no':>10} {milliseconds(found.stages.times[stage]):>12}  {text}"
        )
    rows += ["a layer of the first stage:", *found.solution.lines()]
    if plan is None:
        rows.append("luban pretrain can't run this:")
    elif reasons:
        rows.append("luban pretrain runs the nearest plan; it differs in:")
    return rows + [f"  {reason}" for reason in reasons]


def as_json(found: Found, plan: ParallelPlan | None, reasons: list[str]) -> dict[str, Any]:
    """The same as data."""
    stages = [
        {
            "layers": list(found.layers(stage)),
            "gpus": found.sizes[number],
            "data": data,
            "model": model,
            "recomputes": recomputes,
            "seconds": found.stages.times[stage],
        }
        for stage, ((_, _, number), (data, model, recomputes)) in enumerate(
            zip(found.stages.cuts, found.variants, strict=True)
        )
    ]
    strategies = {
        node.name: str(strategy)
        for node, strategy in zip(found.solution.program.nodes, found.solution.chosen, strict=True)
    }
    return {
        "stages": stages,
        "micro_batches": found.micro_batches,
        "rows": found.rows,
        "step_seconds": found.seconds,
        "layer": strategies,
        "runs": plan is not None,
        "not_executed": reasons,
    }


def explanation(problem: Planned, data: int, model: int, rows: int) -> list[str]:
    """One layer through the passes, its rows over a data axis and its weights over a model axis."""
    from luban.planner.sharding.ir import program_of
    from luban.planner.sharding.passes import explained, megatron_annotations

    layer = problem.workload.model.layers[0]
    annotated = megatron_annotations(program_of(layer, rows), tokens=layer.inputs[0].name)
    return explained(layer, rows, annotated, (data, model))

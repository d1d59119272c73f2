"""`luban plan --prices fluid|packets`: the plans that were found, their messages between nodes priced by the network simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luban.core.arguments import find_recipe
from luban.core.config import from_dict, load_toml
from luban.core.errors import UsageError
from luban.core.units import bytes_, fine_seconds, milliseconds
from luban.netsim import SHIPPED
from luban.netsim.comparison import variants
from luban.netsim.scenario import Scenario
from luban.planner.cluster import Cluster
from luban.planner.search.estimate import Estimate
from luban.planner.search.simulated import NetworkModel, Way, simulated
from luban.train.planning import Planned


@dataclass(frozen=True)
class Prices:
    """The chosen plan's step and its messages between nodes, in every way that was asked for."""

    step: dict[str, float]  # way → seconds
    rows: list[dict[str, Any]]  # a message each: kind, size, axis and way → seconds

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"step_seconds": self.step, "messages": self.rows}

    def lines(self, number: int) -> list[str]:
        """For the person at the terminal; `number` of the plan in the table above."""
        ways = list(self.step)
        steps = ", ".join(f"{milliseconds(self.step[way])} by {WORDS[way]}" for way in ways)
        lines = ["", f"plan {number}: a step of {steps}"]
        if not self.rows:
            return [*lines, "it sends nothing between nodes"]
        lines.append(
            f"{'between nodes':<16} {'bytes':>10} {'processes':>10} {'apart':>6}{''.join(f'{WORDS[w]:>15}' for w in ways)}"
        )
        for row in self.rows:
            times = "".join(f"{fine_seconds(row[way]):>15}" for way in ways)
            lines.append(
                f"{row['kind']:<16} {bytes_(row['bytes']):>10} {row['processes']:>10} {row['apart']:>6}{times}"
            )
        return lines


WORDS = {"closed": "closed form", "fluid": "fluid rates", "packets": "packets"}


def network_of(name: str | None, cluster: Cluster) -> NetworkModel:
    """The network of a scenario, by path or shipped name, or the cluster file's topology.

    Raises:
        UsageError: neither is given, or the scenario has variants.
    """
    if name is not None:
        data = load_toml(find_recipe(name, SHIPPED, "scenario"), SHIPPED)
        if "compare" in data:
            raise UsageError(f"--network {name} has variants ({', '.join(variants(data))}): name a scenario without")
        scenario = from_dict(Scenario, data)
        return NetworkModel(scenario.topology, scenario.transport, scenario.switch)
    if cluster.topology is None:
        raise UsageError(
            "--prices fluid and packets need a network: give --network FILE|NAME (luban simulate --list), or topology = {…} in the "
            "cluster file"
        )
    return NetworkModel(cluster.topology)


def priced(
    found: Sequence[Estimate], problem: Planned, network: NetworkModel, way: str
) -> tuple[list[Estimate], Planned, Prices | None]:
    """The plans at fluid rates, the fastest first, the problem with such prices, and the fastest plan that runs in every way:
    closed form, fluid, and with `way` packets packet by packet."""
    workload, _ = simulated(problem.workload, network, "fluid")
    fluid = sorted((workload.estimate(each.candidate) for each in found), key=lambda each: each.seconds)
    after = replace(problem, workload=workload)
    chosen = next((each for each in fluid if after.refusal(each) is None), None)
    if chosen is None:
        return fluid, after, None
    ways: tuple[Way, ...] = ("fluid", "packets") if way == "packets" else ("fluid",)
    step = {"closed": problem.workload.estimate(chosen.candidate).seconds}
    rows: dict[Any, dict[str, Any]] = {}
    for each in ways:
        again, messages = simulated(problem.workload, network, each)
        step[each] = again.estimate(chosen.candidate).seconds
        for asked in messages.priced:
            row = rows.setdefault(
                (asked.kind, asked.size, asked.axis),
                {
                    "kind": asked.kind,
                    "bytes": asked.size,
                    "processes": asked.axis.size,
                    "apart": asked.axis.stride,
                    "closed": problem.workload.model.messages.crossing(asked.kind, asked.size, asked.axis),
                },
            )
            row[each] = asked.seconds
    return fluid, after, Prices(step, list(rows.values()))

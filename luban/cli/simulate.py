"""`luban simulate`: a cluster network under a workload, packet by packet or as a fluid."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luban.core.arguments import describe_fields, find_recipe
from luban.core.config import from_dict, load_toml, override, to_dict, to_toml
from luban.core.errors import UsageError, nearest
from luban.core.jsonl import write_rows
from luban.core.log import print_result, say
from luban.core.units import bytes_, count, fine_seconds, rate
from luban.core.whole_directory import require_vacant, whole_directory
from luban.netsim import SHIPPED

if TYPE_CHECKING:
    from luban.netsim.scenario import Scenario
    from luban.netsim.simulation import Outcome, Simulation

INTERRUPTED, UNFINISHED = 130, 1  # exit codes
USAGE = """usage: luban simulate FILE.toml|SCENARIO [--out DIR] [--json] [--section.field value …]
       luban simulate --list

How long flows, collectives and training steps take on a cluster network, under which congestion control.
--out DIR gets summary.json, flows.jsonl, ports.jsonl, scenario.toml, report.html with the pictures, and from packets queues.jsonl.
A scenario with tables [compare."name"] is run once with what each of them changes; the result is a table of all.

Texts in a file, with brackets around what may be left out:
  flows_list of the workload flows   "FROM TO BYTES [START_US [CLASS [WEIGHT]]] [via SWITCH …]"; hosts by number, from 0
  links of the topology graph        "NODE NODE GBPS [MICROSECONDS]"; names that begin with host or gpu are hosts, others switches
  failed_links, fail_links           numbers of links, as ports.jsonl has them: in the order of the topology's links, from 0

Examples:
  luban simulate --list
  luban simulate incast --out runs/incast
  luban simulate incast --transport.type dctcp --topology.hosts 41 --json
  luban simulate incast --mode fluid
  luban simulate infiniband_and_roce
  luban simulate training_step --help        # every field of this scenario
"""


def run(argv: Sequence[str]) -> int:
    """Simulate and print; 130 where it was interrupted, 1 where flows can't finish."""
    words = list(argv)
    if "--list" in words:
        print("\n".join(f"{path.stem:<24} {_title(path)}" for path in sorted(SHIPPED.glob("*.toml"))))
        return 0
    if not words or "--help" in words or "-h" in words:
        _help(words)
        return 0
    names, flags, assignments = _split(words)
    if len(names) != 1:
        extra = f": {' '.join(names[1:])} is one word too many" if len(names) == 2 else ""
        raise UsageError(f"luban simulate takes one scenario, {len(names)} given{extra or nearest('', _names())}")
    out = Path(flags["out"]) if "out" in flags else None
    if out is not None:
        require_vacant(out)
    scenarios = _scenarios(names[0], assignments)
    scenario = next(iter(scenarios.values()))
    title = scenario.title or names[0]
    if len(scenarios) > 1:
        return _compare(scenarios, title, out, "json" in flags)
    if scenario.mode == "fluid":
        return _fluid(scenario, title, out, "json" in flags)
    return _packets(scenario, title, out, "json" in flags)


def _scenarios(name: str, assignments: list[tuple[str, str]]) -> dict[str, Scenario]:
    """The scenario, or its variants by name."""
    from luban.netsim.comparison import variants
    from luban.netsim.scenario import Scenario

    found = variants(load_toml(find_recipe(name, SHIPPED, "scenario"), SHIPPED))
    return {variant: from_dict(Scenario, override(data, assignments)) for variant, data in found.items()}


def _names() -> list[str]:
    return [path.stem for path in SHIPPED.glob("*.toml")]


def _title(path: Path) -> str:
    return tomllib.loads(path.read_text(encoding="utf-8")).get("title", "")


def _help(words: Sequence[str]) -> None:
    """With the fields that the named scenario has, of its topology, workload and transport, or with those of all."""
    from luban.netsim.scenario import Scenario

    names, _, assignments = _split([word for word in words if word not in ("--help", "-h")])
    scenario = next(iter(_scenarios(names[0], assignments).values())) if len(names) == 1 else None
    print(f"{USAGE}\n{f'Fields, as {names[0]} has them:' if scenario else 'Fields:'}")
    for path, kind, default, comment in describe_fields(Scenario, of=scenario):
        print(f"  --{path:<28} {comment} [{kind}{', default ' if default else ''}{default}]")


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str], list[tuple[str, str]]]:
    """Names, flags of this verb, and assignments to the scenario's fields."""
    names, flags, assignments = [], {}, []
    left = iter(words)
    for word in left:
        if not word.startswith("--"):
            names.append(word)
        elif word == "--json":
            flags["json"] = "true"
        else:
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = next(left, None)
                if value is None:
                    raise UsageError(f"--{key} needs a value")
            if key == "out":
                flags["out"] = value
            else:
                assignments.append((key.replace("-", "_"), value))
    return names, flags, assignments


def _packets(scenario: Scenario, title: str, out: Path | None, as_json: bool) -> int:
    outcome, simulation, found = _simulated(scenario)
    if out is not None:
        with whole_directory(out) as folder:
            _write(folder, scenario, title, simulation, found)
    print_result(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(title, found)))
    if out is not None and not as_json:
        print_result(f"{out}/report.html")
    return _exit_code(outcome)


def _compare(scenarios: dict[str, Scenario], title: str, out: Path | None, as_json: bool) -> int:
    """Simulate variants one after the other and print a row of each."""
    from luban.netsim.comparison import row, table

    if any(scenario.mode == "fluid" for scenario in scenarios.values()):
        raise UsageError("variants of a scenario are compared packet by packet: leave --mode at packet")
    results, rows, code = {}, dict.fromkeys(scenarios), 0
    for name, scenario in scenarios.items():
        outcome, simulation, found = _simulated(scenario)
        results[name], rows[name] = (scenario, simulation, found), row(simulation, found)
        code = max(code, _exit_code(outcome))
        if code == INTERRUPTED:
            break
    if out is not None:
        with whole_directory(out) as folder:
            (folder / "comparison.json").write_text(
                json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            for name, result in results.items():
                part = folder / re.sub(r"[^\w.-]+", "-", name)
                part.mkdir()
                _write(part, result[0], f"{title}: {name}", *result[1:])
    print_result(json.dumps(rows, indent=2, ensure_ascii=False) if as_json else "\n".join([title, *table(rows)]))
    return code


def _simulated(scenario: Scenario) -> tuple[Outcome, Simulation, dict[str, Any]]:
    from luban.netsim.results import summary

    simulation = scenario.prepare()
    outcome = scenario.execute(simulation, show=True)
    return outcome, simulation, summary(simulation, outcome)


def _write(folder: Path, scenario: Scenario, title: str, simulation: Simulation, found: dict[str, Any]) -> None:
    """Everything that is known of a simulation."""
    from luban.netsim.results import flow_rows, port_rows, queue_rows, span
    from luban.report.network import packet_pictures, write_page

    _write_summary(folder, scenario, found)
    write_rows(folder / "flows.jsonl", flow_rows(simulation))
    write_rows(folder / "ports.jsonl", port_rows(simulation, span(found)))
    write_rows(folder / "queues.jsonl", queue_rows(simulation))
    write_page(packet_pictures(simulation, found), found, title, folder / "report.html")


def _write_summary(folder: Path, scenario: Scenario, found: dict[str, Any]) -> None:
    (folder / "summary.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "scenario.toml").write_text(to_toml(to_dict(scenario)), encoding="utf-8")


def _exit_code(outcome: Outcome) -> int:
    """0 also where the time that the scenario gives was over before the flows were."""
    from luban.netsim.simulation import TIME_IS_OVER

    if outcome.reason == "interrupted":
        return _interrupted()
    if outcome.complete or outcome.reason == TIME_IS_OVER:
        return 0
    say(f"luban: {outcome.reason}")
    return UNFINISHED


def _interrupted() -> int:
    say("luban: interrupted; the figures are those of what was simulated")
    return INTERRUPTED


def _fluid(scenario: Scenario, title: str, out: Path | None, as_json: bool) -> int:
    """What fluid mode knows: flows, and what links carried."""
    from luban.netsim.results import fluid_flow_rows, fluid_port_rows, fluid_summary, span
    from luban.netsim.scenario import fluid_run
    from luban.report.network import fluid_pictures, write_page

    found_run = fluid_run(scenario, show=True)
    found = fluid_summary(found_run)
    if out is not None:
        with whole_directory(out) as folder:
            _write_summary(folder, scenario, found)
            write_rows(folder / "flows.jsonl", fluid_flow_rows(found_run))
            write_rows(folder / "ports.jsonl", fluid_port_rows(found_run, span(found)))
            write_page(fluid_pictures(found_run, found), found, title, folder / "report.html")
    print_result(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(_lines(title, found)))
    if out is not None and not as_json:
        print_result(f"{out}/report.html")
    return _interrupted() if found_run.outcome.interrupted else 0


def _lines(title: str, found: dict[str, Any]) -> list[str]:
    lines = [title, f"  completion            {_completion(found)}"]
    lines.append(f"  goodput               {rate(found['goodput_gbps'])} of all flows together")
    lines.append(f"  flows                 {found['flows_finished']} of {found['flows']} finished")
    for name, times in [("all flows", found["flow_seconds"]), *found.get("by_label", {}).items()]:
        if "mean" in times:
            shown = "  ".join(f"{key} {fine_seconds(times[key])}" for key in ("mean", "p50", "p99", "max"))
            lines.append(f"  {name:<22}{shown}")
    for port, queue in list(found.get("queue_bytes", {}).items())[:4]:
        if queue:
            shown = "  ".join(f"{key} {bytes_(queue[key])}" for key in ("p50", "p99", "max"))
            use, second = found["use"][port], found["second_half"]["use"][port]
            lines.append(
                f"  queue {port:<16} {shown}  {_share(use)} of the link used, {_share(second)} in the second half"
            )
    if "drops" in found:
        lines.append(
            f"  drops {found['drops']}, marks {found['marks']}, pauses {found['pauses']}, retransmits {found['retransmits']}, "
            f"timeouts {found['timeouts']}"
        )
        lines.append(
            f"  {count(found['events'])} events, {count(found['packets_delivered'])} packets delivered in "
            f"{found['seconds']:.2f} s ({count(found['events_per_second'])} events/s); ended because {found['reason']}"
        )
    return lines


def _completion(found: dict[str, Any]) -> str:
    if found["completion_seconds"] is not None:
        return fine_seconds(found["completion_seconds"])
    return f"not complete ({found['flows_finished']} of {found['flows']} flows)"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"

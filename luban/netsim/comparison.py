"""One scenario in several variants: the tables `[compare."name"]` of its file, each laid on the rest, and a row of figures of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luban.core.config import merge
from luban.core.errors import ConfigError
from luban.core.units import bytes_, fine_seconds
from luban.netsim.simulation import Simulation

COLUMNS = ("ends", "mean", "deviation", "p99", "max", "longest queue", "drops", "pauses", "sent again")


def variants(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → a scenario as plain data, in the order of the file; without `compare` one without a name.

    Raises:
        ConfigError: `compare` that is no table of tables.
    """
    rest = {key: value for key, value in data.items() if key != "compare"}
    given = data.get("compare", {})
    if not isinstance(given, dict) or not all(isinstance(over, dict) for over in given.values()):
        raise ConfigError('compare: tables [compare."name"] with what is different there are needed')
    return {name: merge(rest, over) for name, over in given.items()} or {"": rest}


def row(simulation: Simulation, found: dict[str, Any]) -> dict[str, Any]:
    """What of a variant is compared: the times of its answers where flows answer others, else of its first kind of flow; `ends` is
    None where one of these hasn't finished. `complete` and `reason` are of the whole run.

    Args:
        found: `luban.netsim.results.summary`'s.
    """
    answers = [flow.label for flow in simulation.flows if flow.since is not None]
    labels = [*answers, *(flow.label for flow in simulation.flows if flow.duration is None)]
    times = found["by_label"].get(labels[0], {**found["flow_seconds"], "end": found["completion_seconds"]})
    return {
        "ends": times["end"],
        "flows": times.get("flows", found["flows"]),
        "flows_finished": times.get("flows_finished", found["flows_finished"]),
        "complete": found["complete"],
        "reason": found["reason"],
        **{name: times.get(name) for name in ("mean", "deviation", "p99", "max")},
        "longest queue": found["longest_queue_bytes"],
        "drops": found["drops"],
        "pauses": found["pauses"],
        "sent again": found["retransmits"],
    }


def table(rows: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """Lines, one a variant; None: it was not run. One that was cut off says so."""
    width = max(len(name) for name in rows) + 2
    lines = [f"  {'':<{width}}{''.join(f'{name:>14}' for name in COLUMNS)}"]
    for name, found in rows.items():
        if found is None:
            lines.append(f"  {name:<{width}}{'not run':>14}")
            continue
        cells = "".join(f"{_text(column, found[column]):>14}" for column in COLUMNS)
        lines.append(f"  {name:<{width}}{cells}{'' if found['ends'] is not None else _cut_off(found)}")
    return lines


def _cut_off(found: dict[str, Any]) -> str:
    return f"  not complete ({found['flows_finished']} of {found['flows']} flows): {found['reason']}"


def _text(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "longest queue":
        return bytes_(value)
    return fine_seconds(value) if column in COLUMNS[:5] else f"{value:,}"

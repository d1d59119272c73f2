"""One scenario in several variants: the tables `[compare."name"]` of its file, each laid on the rest, and a row of figures of each."""

from __future__ import annotations

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
    """What of a variant is compared: the times of its answers where flows answer others, else of its first kind of flow.

    Args:
        found: `luban.netsim.results.summary`'s.
    """
    answers = [flow.label for flow in simulation.flows if flow.since is not None]
    labels = [*answers, *(flow.label for flow in simulation.flows if flow.duration is None)]
    times = found["by_label"].get(labels[0], found["flow_seconds"])
    return {
        "ends": times.get("end", found["completion_seconds"]),
        **{name: times.get(name) for name in ("mean", "deviation", "p99", "max")},
        "longest queue": found["longest_queue_bytes"],
        "drops": found["drops"],
        "pauses": found["pauses"],
        "sent again": found["retransmits"],
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines, one a variant."""
    width = max(len(name) for name in rows) + 2
    lines = [f"  {'':<{width}}{''.join(f'{name:>14}' for name in COLUMNS)}"]
    for name, found in rows.items():
        lines.append(f"  {name:<{width}}{''.join(f'{_text(column, found[column]):>14}' for column in COLUMNS)}")
    return lines


def _text(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "longest queue":
        return bytes_(value)
    return fine_seconds(value) if column in COLUMNS[:5] else f"{value:,}"

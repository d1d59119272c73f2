"""Pictures of a network simulation: queues over time, completion times, use of links, the topology."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import atomic_write
from luban.core.units import bytes_
from luban.netsim.results import flow_rows, fluid_flow_rows, fluid_port_rows, port_rows, span
from luban.netsim.scenario import FluidRun
from luban.netsim.simulation import Simulation
from luban.netsim.topology.network import Network
from luban.report.chart import Chart, Series, draw, stroke

TONES = "abcd"
POINTS = 600  # of a curve
FEW_SIZES = 5  # of flows: between fewer than so many sizes a curve would mean nothing
DRAWN_NODES = 600  # of a topology; larger ones are not drawn
WIDTH, ROW, MARGIN = 900, 110, 40
ARCS = 40  # above the first row
PANEL = 170  # height of one queue's picture
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 960px; color: #1d2530; background: #fff;
  --a: #2563a8; --b: #c2571a; --c: #2f7d4f; --d: #7a4fa3; --line: #dfe4ea; --soft: #5a6675; }
svg { width: 100%; height: auto; } .grid { stroke: var(--line); } .axis { stroke: var(--soft); } text { fill: var(--soft); font-size: 11px; }
.curve { fill: none; stroke-width: 1.6; } .a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); } .d { stroke: var(--d); }
.dot.a { fill: var(--a); } .sample { width: 44px; height: 12px; } figure { margin: 0.4em 0; } .legend span { margin-right: 1.2em; } table { border-collapse: collapse; } td { padding: 2px 12px 2px 0; }
.switch { fill: #2563a8; } .host { fill: #8a94a0; } .cable { fill: none; stroke-linecap: round; } h2 { margin-top: 2em; }
@media (prefers-color-scheme: dark) { body { color: #dde3ea; background: #14181d; --line: #2b323a; --soft: #98a3af; --a: #6aa5e6;
  --b: #e6935c; --c: #6fc08f; --d: #b593dd; } }
"""


def write_page(pictures: Sequence[tuple[str, str]], found: dict[str, Any], title: str, out: Path) -> None:
    """One page with every picture and the summary's figures.

    Args:
        pictures: headings and SVG; an empty one is left out.
        found: `luban.netsim.results.summary`'s or `fluid_summary`'s.
    """
    parts = [f"<h1>{escape(title)}</h1>", _table(found)]
    for heading, picture in pictures:
        if picture:
            parts += [f"<h2>{heading}</h2>", picture]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    atomic_write(out, page + "<body>" + "\n".join(parts) + "</body></html>")


def packet_pictures(simulation: Simulation, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Headings and pictures of a run of packets."""
    flows, sent = list(flow_rows(simulation)), simulation.state.ports["tx_bytes"]
    return [
        ("Queues", queue_chart(simulation)),
        ("Flow completion times", completion_chart(flows)),
        ("Slowdown by size", slowdown_chart(flows)),
        ("Use of links", use_chart(port_rows(simulation, span(found)))),
        ("Topology", topology_picture(simulation.network, sent, span(found))),
    ]


def fluid_pictures(run: FluidRun, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Headings and pictures of fluid mode, which has no queues."""
    return [
        ("Flow completion times", completion_chart(fluid_flow_rows(run))),
        ("Use of links", use_chart(fluid_port_rows(run, span(found)))),
        ("Topology", topology_picture(run.network, run.carried, span(found))),
    ]


def _table(found: dict[str, Any]) -> str:
    rows = [(name.replace("_", " "), value) for name, value in found.items() if not isinstance(value, dict)]
    cells = (f"<tr><td>{escape(name)}</td><td>{escape(_text(value))}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _legend(names: Sequence[str]) -> str:
    """Names beside pieces of their lines."""
    found = []
    for i, name in enumerate(names):
        attributes = stroke(i) if len(names) > 1 else ""
        line = f'<path class="curve {TONES[i]}"{attributes} d="M0,6L44,6"/>'
        sample = f'<svg class="sample" viewBox="0 0 44 12" aria-hidden="true">{line}</svg>'
        found.append(f'<span style="color:var(--{TONES[i]})">{sample} {escape(name)}</span>')
    return f'<p class="legend">{"".join(found)}</p>'


def queue_chart(simulation: Simulation) -> str:
    """Bytes queued over time, of the four ports with the longest queues: a panel each, all with one scale, as queues of ports that
    carry the same traffic lie on each other."""
    times, ports, _ = simulation.samples()
    if not len(times) or not ports.shape[1]:
        return ""
    order = np.argsort(-ports[:, :, 0].max(axis=0), kind="stable")[: len(TONES)]
    step = max(1, len(times) // POINTS)
    longest, panels = float(ports[:, order, 0].max()) / 1e3, []
    for tone, i in zip(TONES, order, strict=False):
        kept = range(0, len(times), step)
        points = [(times[k] * 1e6, float(ports[k : k + step, i, 0].max()) / 1e3) for k in kept]
        name = simulation.network.port_name(int(simulation.state.watched_ports[i]))
        chart = Chart(
            f"Queue of {name}",
            "microseconds",
            "kB queued",
            [Series(name, points, tone)],
            zero=True,
            top=longest,
            height=PANEL,
        )
        panels.append(
            f'<figure><figcaption style="color:var(--{tone})">{escape(name)}</figcaption>{draw(chart)}</figure>'
        )
    return "".join(panels)


def completion_chart(flows: Iterable[dict[str, Any]]) -> str:
    """The share of flows that have taken at most so long, a curve for each label; `flows`: rows of flows.jsonl."""
    groups: dict[str, list[float]] = {}
    for row in flows:
        if row["seconds"] is not None:
            groups.setdefault(row["label"] or "flows", []).append(row["seconds"] * 1e6)
    if len(groups) > len(TONES):
        groups = {"flows": [x for values in groups.values() for x in values]}
    series = [Series(name, _distribution(values), TONES[i]) for i, (name, values) in enumerate(groups.items())]
    if not series:
        return ""
    return _legend(list(groups)) + draw(Chart("Completion times", "microseconds", "share of flows", series, zero=True))


def _distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = np.sort(values)
    kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), POINTS)).astype(int))
    return [(float(ordered[i]), (i + 1) / len(ordered)) for i in kept]


def slowdown_chart(flows: Iterable[dict[str, Any]]) -> str:
    """Median and 99th percentile of the slowdown, over flow size in twenty equal groups; of few sizes as a table."""
    rows = sorted((row["bytes"], row["slowdown"]) for row in flows if row["slowdown"] is not None)
    if len(rows) < 200 or rows[0][0] == rows[-1][0]:
        return ""
    sizes = sorted({size for size, _ in rows})
    if len(sizes) < FEW_SIZES:
        return _slowdown_table({size: [slow for other, slow in rows if other == size] for size in sizes})
    groups = [group for group in np.array_split(np.array(rows), 20) if len(group)]
    points = [(float(np.log10(max(np.median(g[:, 0]), 1))), np.percentile(g[:, 1], [50, 99])) for g in groups]
    series = [Series(name, [(x, float(y[k])) for x, y in points], TONES[k]) for k, name in enumerate(("median", "p99"))]
    return _legend(["median", "p99"]) + draw(
        Chart("Slowdown", "log10 of bytes", "time over that alone", series, zero=True)
    )


def _slowdown_table(by_size: dict[int, list[float]]) -> str:
    rows = "".join(
        f"<tr><td>{bytes_(size)}</td><td>{len(found):,}</td><td>{np.median(found):.3g}</td><td>{np.percentile(found, 99):.3g}</td></tr>"
        for size, found in by_size.items()
    )
    return f"<table><tr><td>size</td><td>flows</td><td>median</td><td>p99</td></tr>{rows}</table>"


def use_chart(ports: Iterable[dict[str, Any]]) -> str:
    """The ports' use, sorted; `ports`: rows of ports.jsonl."""
    used = sorted((row["use"] for row in ports), reverse=True)
    if not used:
        return ""
    step = max(1, len(used) // POINTS)
    points = [(float(i + 1), used[i]) for i in range(0, len(used), step)]
    return draw(
        Chart(
            "Use of links", "ports, the most used first", "share of the rate", [Series("use", points, "a")], zero=True
        )
    )


def topology_picture(network: Network, sent: np.ndarray, seconds: float) -> str:
    """Nodes in rows by tier, links the darker the more they were used, those within a row as arcs; nothing for networks too large to
    draw.

    Args:
        sent: bytes of each port, (ports,), in so many seconds.
    """
    if len(network.names) > DRAWN_NODES:
        return ""
    tiers = sorted(set(network.tiers), reverse=True)
    arcs_above = any(network.tiers[link.a] == network.tiers[link.b] == tiers[0] for link in network.links)
    top = MARGIN + (ARCS if arcs_above else 0)
    height = top + MARGIN + ROW * (len(tiers) - 1)
    at: dict[int, tuple[float, float]] = {}
    for row, tier in enumerate(tiers):
        nodes = [n for n, t in enumerate(network.tiers) if t == tier]
        for i, node in enumerate(nodes):
            at[node] = (MARGIN + (WIDTH - 2 * MARGIN) * (i + 0.5) / len(nodes), top + ROW * row)
    lines = []
    for i, link in enumerate(network.links):
        use = 0.0
        if seconds:
            use = min(float(sent[2 * i : 2 * i + 2].max()) * 8 / (link.rate * 1e6 * seconds), 1.0)
        (x1, y1), (x2, y2) = at[link.a], at[link.b]
        lines.append(
            f'<path class="cable" d="M{x1:.1f},{y1:.1f}{_bend(x1, x2, y1, y2)}" stroke="hsl({210 - 190 * use:.0f} 60% 55%)" '
            f'stroke-width="{0.6 + 2.4 * use:.1f}" opacity="{0.35 + 0.65 * use:.2f}"><title>{escape(network.names[link.a])} – '
            f"{escape(network.names[link.b])}: {link.rate / 1000:g} Gb/s, {use:.0%} used</title></path>"
        )
    dots = (
        f'<circle class="{"switch" if network.switches[n] else "host"}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if network.switches[n] else 3}">'
        f"<title>{escape(network.names[n])}</title></circle>"
        for n, (x, y) in at.items()
    )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Topology">{"".join(lines)}{"".join(dots)}</svg>'


def _bend(x1: float, x2: float, y1: float, y2: float) -> str:
    """The rest of a link's path: straight, or within a row an arc, the higher the further its ends are apart."""
    if y1 != y2:
        return f"L{x2:.1f},{y2:.1f}"
    height = min(12 + abs(x2 - x1) / 4, 1.4 * ROW)
    return f"Q{(x1 + x2) / 2:.1f},{y1 - height:.1f} {x2:.1f},{y2:.1f}"

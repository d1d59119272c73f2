"""The family tree of artifacts as SVG: a layered drawing, parents left of their children."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from luban.core.artifact import Manifest, Parent

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 168, 58, 56, 22


class Family:
    """Artifacts keyed by content hash, with an edge from each parent to each child."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, str]] = {}  # hash → (name, kind)
        self.notes: dict[str, str] = {}  # hash → a figure worth showing
        self.edges: set[tuple[str, str]] = set()  # (parent hash, child hash)

    def add(self, name: str, manifest: Manifest, note: str = "") -> None:
        """An artifact with all that it remembers of its ancestors."""
        self.names[manifest.content_hash] = (name, manifest.kind)
        self.notes[manifest.content_hash] = note
        self._ancestors(manifest.content_hash, manifest.parents)

    def _ancestors(self, child: str, parents: Iterable[Parent]) -> None:
        for parent in parents:
            self.names.setdefault(parent.content_hash, (parent.name, parent.kind))
            self.edges.add((parent.content_hash, child))
            self._ancestors(parent.content_hash, parent.parents)

    def layers(self) -> list[list[str]]:
        """Hashes by their longest distance from an artifact without parents, crossings kept few."""
        parents: dict[str, list[str]] = {h: [] for h in self.names}
        for parent, child in sorted(self.edges):
            parents[child].append(parent)
        depth: dict[str, int] = {}

        def measure(node: str) -> int:
            if node not in depth:
                depth[node] = 1 + max((measure(p) for p in parents[node]), default=-1)
            return depth[node]

        columns: list[list[str]] = [[] for _ in range(1 + max(map(measure, self.names), default=-1))]
        for node in self.names:
            columns[depth[node]].append(node)
        order: dict[str, float] = {}
        for column in columns:  # one pass of the barycentre rule of Sugiyama et al. 1981
            column.sort(key=lambda n: sum(order[p] for p in parents[n]) / len(parents[n]) if parents[n] else 0.0)
            order.update({node: index - (len(column) - 1) / 2 for index, node in enumerate(column)})
        return columns

    def draw(self) -> str:
        """The tree as an SVG element."""
        columns = self.layers()
        tallest = max(map(len, columns), default=0)
        width = len(columns) * (BOX_WIDTH + GAP_X) - GAP_X + 4
        height = tallest * (BOX_HEIGHT + GAP_Y) - GAP_Y + 4
        spots: dict[str, tuple[float, float]] = {}
        for i, column in enumerate(columns):
            top = (height - (len(column) * (BOX_HEIGHT + GAP_Y) - GAP_Y)) / 2
            for j, node in enumerate(column):
                spots[node] = (2 + i * (BOX_WIDTH + GAP_X), top + j * (BOX_HEIGHT + GAP_Y))
        parts = [_edge(spots[a], spots[b]) for a, b in sorted(self.edges)]
        parts += [self._box(node, *spot) for node, spot in spots.items()]
        return (
            f'<svg class="family" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
            f'aria-label="family tree of artifacts">{"".join(parts)}</svg>'
        )

    def _box(self, node: str, x: float, y: float) -> str:
        name, kind = self.names[node]
        lines = (("title", name), ("kind", f"{kind} · {node[:8]}"), ("note", self.notes.get(node, "")))
        text = "".join(
            f'<text class="{style}" x="{x + 12}" y="{y + 19 + 15 * i:.1f}">{escape(line[:27])}</text>'
            for i, (style, line) in enumerate(lines)
        )
        return (
            f'<g><title>{escape(f"{name}: {kind} {node}")}</title><rect class="box {kind}" x="{x}" y="{y:.1f}" '
            f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>{text}</g>'
        )


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT / 2
    x2, y2 = end[0], end[1] + BOX_HEIGHT / 2
    bend = max(20.0, (x2 - x1) / 2)
    return f'<path class="edge" d="M{x1},{y1:.1f} C{x1 + bend},{y1:.1f} {x2 - bend},{y2:.1f} {x2},{y2:.1f}"/>'


def family_of(artifacts: Iterable[tuple[str, Manifest, str]]) -> str:
    """The drawing for artifacts given as (name, manifest, note)."""
    family = Family()
    for name, manifest, note in artifacts:
        family.add(name, manifest, note)
    return family.draw()

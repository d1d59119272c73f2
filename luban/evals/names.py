"""Names of the task files that come with Luban; imports nothing, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "tasks"


def shipped_tasks() -> list[str]:
    """The names, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))

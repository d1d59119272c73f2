"""What a benchmark's folder or file was made with, so that data or runs of other settings are never taken for those asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def require_settings(folder: Path, **settings: Any) -> None:
    """Write the settings into a folder that has none, and end the program where it has others."""
    folder.mkdir(parents=True, exist_ok=True)
    file, told = folder / "settings.json", json.loads(json.dumps(settings))
    if not file.exists():
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    else:
        require_same(folder, json.loads(file.read_text(encoding="utf-8")), told)


def rows_of(file: Path | None, **settings: Any) -> dict[str, Any]:
    """`settings`, and the `rows` that a file made with them holds; none where it isn't there. A file of others ends the program."""
    told = json.loads(json.dumps(settings))
    if file is None or not file.exists():
        return {"settings": told, "rows": {}}
    kept = json.loads(file.read_text(encoding="utf-8"))
    require_same(file, kept.get("settings", {}), told)
    return kept


def require_same(made: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """End the program where what was `made` has other settings than those `asked` for."""
    names = [name for name in {**kept, **asked} if kept.get(name) != asked.get(name)]
    if names:
        differ = ", ".join(f"{name} {kept.get(name)} (now {asked.get(name)})" for name in names)
        sys.exit(f"{made} was made with {differ}: give another --out, or the same settings")

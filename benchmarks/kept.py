"""What a benchmark's folder was made with, so that data or runs of other settings are never taken for those asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def require_settings(folder: Path, **settings: Any) -> None:
    """Write the settings into a folder that has none, and end the program where it has others."""
    folder.mkdir(parents=True, exist_ok=True)
    file, told = folder / "settings.json", json.loads(json.dumps(settings))
    if not file.exists():
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    elif (kept := json.loads(file.read_text(encoding="utf-8"))) != told:
        differ = ", ".join(f"{k} {kept.get(k)} (now {told.get(k)})" for k in kept | told if kept.get(k) != told.get(k))
        sys.exit(f"{folder} was made with {differ}: give another --out, or the same settings")

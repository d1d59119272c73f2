"""`python -m luban.align.rewards.worker FILE FUNCTION`: calls a reward function for each JSON line of standard input."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answer a line for every line. What the function prints goes to standard error."""
    file, function = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        spec = importlib.util.spec_from_file_location("reward", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
        spec.loader.exec_module(module)
    except BaseException as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        return
    call: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(call):
        found = ", ".join(name for name, value in vars(module).items() if callable(value) and name[0] != "_")
        print(json.dumps({"error": f"there is no such function in the file, but {found or 'none'}"}), file=replies)
        return
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        asked = json.loads(line)
        row = asked["row"]
        try:
            prompt = next((row[name] for name in ("prompt", "question", "messages") if name in row), "")
            reply: dict[str, object] = {"score": float(call(prompt, asked["answer"], row))}
        except Exception as error:
            reply = {"error": f"it raised {type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()

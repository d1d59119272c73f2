"""Answers of models by the content of what was asked, one a line of a file that a crash leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from luban.evals.requests import Request, Response, response_from


class ResponseStore:
    """Responses to requests, kept in FILE.jsonl and, where given, in a cache that several evaluations share.

    Each line is `{"key", "request", "response"}`. A last line that a crash cut off is dropped. Used with `with`.

    Args:
        path: the evaluation's own file; what it holds already is known.
        identity: of the model, a part of each key.
        cache: a folder; the answers of each model are in a file of their own there.
    """

    def __init__(self, path: Path, identity: str, cache: Path | None = None):
        self.identity = identity
        self._known: dict[str, Response] = {}
        self._own = _repaired(path)
        self._own_keys = set(self._read(path))
        self._shared: IO[bytes] | None = None
        self._shared_keys: set[str] = set()
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            shared = cache / f"{identity[:24]}.jsonl"
            self._shared = _repaired(shared)
            self._shared_keys = set(self._read(shared))

    def __enter__(self) -> ResponseStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()
        if self._shared is not None:
            self._shared.close()

    def _read(self, path: Path) -> list[str]:
        keys = []
        with open(path, "rb") as lines:
            for line in lines:
                row = json.loads(line)
                self._known.setdefault(row["key"], response_from(row["response"]))
                keys.append(row["key"])
        return keys

    def get(self, request: Request) -> Response | None:
        """The answer, if it is known."""
        return self._known.get(request.key(self.identity))

    def add(self, found: Iterable[tuple[Request, Response]]) -> None:
        """Keep answers, on the disk when this returns."""
        for request, response in found:
            key = request.key(self.identity)
            self._known[key] = response
            row = {"key": key, "request": request.to_json(), "response": response.to_json()}
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            for file, keys in ((self._own, self._own_keys), (self._shared, self._shared_keys)):
                if file is not None and key not in keys:
                    file.write(line)
                    keys.add(key)
        for file in (self._own, self._shared):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())

    def keep(self, request: Request) -> None:
        """Let the evaluation's own file hold an answer that came from the shared cache."""
        key = request.key(self.identity)
        if key not in self._own_keys:
            self.add([(request, self._known[key])])


def _repaired(path: Path) -> IO[bytes]:
    """The file, opened to append to, without a last line that isn't whole."""
    file = open(path, "a+b")
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < end:
        file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return file

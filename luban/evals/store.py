"""Answers of models by the content of what was asked, one a line of a file that a crash leaves readable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from luban.core.errors import DataError, UnfinishedError
from luban.core.log import progress
from luban.evals.backends.base import Backend
from luban.evals.requests import Failed, Prompt, Request, Response, Score, Write, response_from


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


def answer_all(requests: Sequence[Request], backend: Backend, store: ResponseStore, title: str) -> dict[str, Response]:
    """An answer to each request, by `request.key("")`: those that are kept already, and those that the backend gives, kept
    round by round.

    Raises:
        UnfinishedError: the backend refused to go on after some answers were kept; DataError: before any was.
    """
    hashed: dict[str, Request] = {request.key(""): request for request in requests}
    found: dict[str, Response] = {}
    for key, request in hashed.items():
        if (known := store.get(request)) is not None:
            found[key] = known
            store.keep(request)
    wanted = sorted((key for key in hashed if key not in found), key=lambda key: -_size(hashed[key]))
    with progress(title, len(wanted), "requests") as bar:
        for start in range(0, len(wanted), backend.round_size):
            keys = wanted[start : start + backend.round_size]
            try:
                responses = backend.respond([hashed[key] for key in keys])
            except DataError as error:
                if not found:
                    raise
                raise UnfinishedError(f"{error}; {len(found)} answers are kept, and the same command resumes") from None
            fresh = dict(zip(keys, responses, strict=True))
            store.add([(hashed[key], each) for key, each in fresh.items() if not isinstance(each, Failed)])
            found |= fresh
            bar.advance(len(keys))
    return found


def _size(request: Request) -> int:
    """Characters that are read, so that requests of about one length share a batch."""
    if isinstance(request, Score):
        return len(str(request.context)) + len(request.continuation)
    return len(str(request.prompt)) if isinstance(request, Write) else len(str(request))


class StoredBackend:
    """A backend whose answers are kept in a store: what it holds isn't asked again."""

    def __init__(self, backend: Backend, store: ResponseStore, title: str):
        self.backend, self.store, self.title = backend, store, title
        self.name, self.identity, self.counts = backend.name, backend.identity, backend.counts
        self.round_size = 1 << 20  # the store divides them by the backend's own

    def about(self) -> dict[str, Any]:
        """See `Backend`."""
        return self.backend.about()

    def seen(self, prompt: Prompt) -> str:
        """See `Backend`."""
        return self.backend.seen(prompt)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """See `Backend`."""
        found = answer_all(requests, self.backend, self.store, self.title)
        return [found[request.key("")] for request in requests]

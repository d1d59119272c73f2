"""Which replica a request goes to: the one that has read the longest prefix of its text before,
unless others have much less to do."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Collection
from itertools import islice
from typing import Any

CHUNK = 256  # characters; prefixes are compared in steps of so many
LONGEST = 64  # chunks of a text that are looked at
REMEMBERED = 100_000  # prefixes; the longest unused is forgotten first
UNEVEN = 8  # requests that the replica with the longest prefix may have more than the one with the fewest


class Router:
    """Remembers which replica read which prefixes last.

    Args:
        replicas: their number.
    """

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.running: Counter[int] = Counter()  # requests of each
        self._last: OrderedDict[bytes, int] = OrderedDict()  # prefix → the replica

    def choose(self, text: str, ready: Collection[int]) -> int:
        """The replica for a request, of those that are `ready`; count it by `begin` and `end`."""
        fewest = min(ready, key=lambda replica: (self.running[replica], replica))
        chosen = fewest
        for prefix in _prefixes(text):
            replica = self._last.get(prefix)
            if replica is None:
                break
            if replica in ready and self.running[replica] <= self.running[fewest] + UNEVEN:
                chosen = replica
        return chosen

    def begin(self, replica: int, text: str) -> None:
        """A request has gone there."""
        self.running[replica] += 1
        for prefix in _prefixes(text):
            self._last[prefix] = replica
            self._last.move_to_end(prefix)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)

    def end(self, replica: int) -> None:
        """It has been answered, or not."""
        self.running[replica] -= 1

    def forget(self, replica: int) -> None:
        """It starts anew, and has read nothing."""
        self._last = OrderedDict((prefix, at) for prefix, at in self._last.items() if at != replica)


def text_of(body: bytes) -> str:
    """What a request's answer begins with: model, then messages or prompt, in the order in which a model reads them."""
    try:
        asked: Any = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(asked, dict):
        return ""
    read = asked.get("messages") or asked.get("prompt") or asked.get("input") or ""
    parts = read if isinstance(read, list) else [read]
    written = (part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)
    return f"{asked.get('model', '')}\0" + "".join(islice(written, CHUNK * LONGEST))


def _prefixes(text: str) -> list[bytes]:
    """Of each whole chunk of the text a hash of all up to its end; a text below one chunk has one prefix, itself."""
    if len(text) < CHUNK:
        return [hashlib.sha256(text.encode("utf-8", "replace")).digest()] if text else []
    found, before = [], b""
    for first in range(0, min(len(text) - CHUNK + 1, CHUNK * LONGEST), CHUNK):
        before = hashlib.sha256(before + text[first : first + CHUNK].encode("utf-8", "replace")).digest()
        found.append(before)
    return found

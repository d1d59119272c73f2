"""POST and GET of JSON to an OpenAI-compatible server, tried again where that may help."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from luban.core.errors import DataError, UsageError

FIRST_WAIT = 0.5  # seconds before the second try; doubled before each further one
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses that another try may not meet
REFUSED = frozenset({401, 403, 404, 405})  # statuses that every request would meet


class NoAnswer(Exception):
    """A request had no usable answer, however often it was tried."""


class BadAnswer(Exception):
    """An answer that isn't what was asked for."""


@dataclass
class Connection:
    """A server.

    Raises UsageError for an address that isn't one.
    """

    address: str  # with or without /v1
    api_key: str = ""  # sent with each request
    timeout: float = 120.0  # seconds for an answer
    tries: int = 4  # of each request

    def __post_init__(self):
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"'{self.address}' is no address of a server, such as http://127.0.0.1:8000/v1")
        self.root = self.address.rstrip("/").removesuffix("/v1") + "/v1"

    def ask(self, route: str, body: dict[str, Any] | None, check: Any, counts: Counter[str]) -> Any:
        """What `check` makes of the JSON that a route answers with; tried again where the connection fails, the server is busy,
        the answer isn't JSON or `check` raises BadAnswer, LookupError, TypeError or ValueError.

        Args:
            body: for POST; None: GET.
            counts: each try but the first is counted as `retries`.

        Raises:
            NoAnswer: the last try failed, too; says why.
            DataError: a status that says the same of every request (no such route, a wrong key).
        """
        why = ""
        for attempt in range(self.tries):
            if attempt:
                counts["retries"] += 1
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return check(self._once(route, body))
            except urllib.error.HTTPError as error:
                said = error.read()[:200].decode(errors="replace")
                why = f"status {error.code}: {said}"
                if error.code in REFUSED:
                    raise DataError(f"{self.root}{route} refuses: {why}") from None
                if error.code not in RETRIED:
                    raise NoAnswer(why) from None
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
            except (BadAnswer, LookupError, TypeError, ValueError) as error:
                why = f"an answer that can't be used ({type(error).__name__}: {error})"
        raise NoAnswer(f"{why} ({self.tries} tries)")

    def _once(self, route: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + route, data, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            return json.loads(reply.read())

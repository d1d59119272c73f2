"""One streaming completion over HTTP, and when its parts came. No package is needed beside Python's own."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from luban.core.errors import DataError, UsageError

TIMEOUT = 600.0  # seconds without a byte


@dataclass
class Timed:
    """What became of a request; times in seconds of `time.perf_counter`."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # of chunks with text
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class Server:
    """An OpenAI-compatible server.

    Args:
        url: its address, with or without /v1.
        model: name of the model; None: the first that it lists.
        api_key: sent with each request.
        extra: fields added to each body.

    Raises:
        UsageError: an address that isn't one.
        DataError: nothing answers there, or no list of models.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, extra: dict[str, Any] | None = None
    ):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"'{url}' is no address of a server, such as http://127.0.0.1:8000")
        self.secure, self.host, self.port = parts.scheme == "https", parts.hostname, parts.port
        self.root = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.extra = extra or {}
        self.model = model or self._first_model()

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=TIMEOUT)

    def _first_model(self) -> str:
        try:
            connection = self._connection()
            connection.request("GET", f"{self.root}/v1/models", headers=self.headers)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        except OSError as error:
            raise DataError(f"nothing answers at {self.host}:{self.port}: {error}") from None
        try:
            return str(json.loads(content)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise DataError(
                f"{self.host}:{self.port} lists no models (status {answer.status}): {content[:200].decode(errors='replace')}"
            ) from None

    def complete(self, prompt: str, max_tokens: int) -> Timed:
        """Send a prompt and read its answer to the end. What goes wrong is `Timed.error`."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }
        timed = Timed(time.perf_counter())
        connection = self._connection()
        try:
            connection.request("POST", f"{self.root}/v1/completions", json.dumps(body), self.headers)
            answer = connection.getresponse()
            if answer.status != 200:
                timed.error = f"status {answer.status}: {answer.read()[:200].decode(errors='replace')}"
            else:
                self._read(answer, timed)
        except (OSError, http.client.HTTPException) as error:
            timed.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
            timed.ended = time.perf_counter()
        return timed

    def _read(self, answer: http.client.HTTPResponse, timed: Timed) -> None:
        """Note the chunks of a stream of server-sent events."""
        for line in answer:
            data = line.strip().removeprefix(b"data:").strip()
            if not data:
                continue
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                timed.error = str(chunk["error"].get("message", chunk["error"]))
                return
            if usage := chunk.get("usage"):
                timed.prompt_tokens, timed.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if any(choice.get("text") or choice.get("finish_reason") for choice in chunk.get("choices") or ()):
                timed.arrivals.append(time.perf_counter())
        timed.error = timed.error or "the stream broke off"

    def tokens_a_word(self, text: str) -> float:
        """Tokens of the server's tokenizer for each word of a text. Raises DataError where it doesn't answer."""
        timed = self.complete(text, 1)
        if timed.error or not timed.prompt_tokens:
            raise DataError(f"{self.host}:{self.port} doesn't answer: {timed.error or 'it reports no usage'}")
        return timed.prompt_tokens / len(text.split())

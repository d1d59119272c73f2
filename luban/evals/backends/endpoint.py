"""An OpenAI-compatible server as a model: chats, completions, and log-probabilities of echoed prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from luban.core.errors import DataError, UnsupportedError
from luban.core.hashing import data_sha256
from luban.core.seeding import derive
from luban.evals.backends.http import BadAnswer, Connection, NoAnswer
from luban.evals.requests import Failed, Prompt, Request, Response, Roll, Score, Scored, Write, Written


class EndpointBackend:
    """A model behind an address. What gets no usable answer is `Failed`, never an empty text.

    Args:
        connection: to the server.
        model: its name there; empty: the first that the server lists.
        parallel: requests in flight at once.

    Raises:
        DataError: nothing answers there, or no list of models.
    """

    def __init__(self, connection: Connection, *, model: str = "", parallel: int = 8):
        self.connection, self.counts, self.parallel = connection, Counter[str](), parallel
        self.name = model or self._first_model()
        self.round_size = 4 * parallel
        self.identity = data_sha256([connection.root, self.name])

    def _first_model(self) -> str:
        try:
            return self.connection.ask("/models", None, lambda found: str(found["data"][0]["id"]), self.counts)
        except NoAnswer as error:
            raise DataError(f"{self.connection.root} lists no models: {error}") from None

    def about(self) -> dict[str, Any]:
        """See `Backend`."""
        return {"model": self.name, "endpoint": self.connection.root}

    def seen(self, prompt: Prompt) -> str:
        """The text, or the messages as JSON: what tokens the server makes of them isn't known."""
        return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """See `Backend`."""
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Response:
        route, body, check = self._asked(request)
        try:
            return self.connection.ask(route, {"model": self.name, **body}, check, self.counts)
        except NoAnswer as error:
            self.counts["failed"] += 1
            return Failed(error=str(error))

    def _asked(self, request: Request) -> tuple[str, dict[str, Any], Callable[[Any], Response]]:
        if isinstance(request, Write):
            body: dict[str, Any] = {"max_tokens": request.max_tokens, "temperature": request.temperature}
            body |= {"top_p": request.top_p, **({"stop": list(request.stop)} if request.stop else {})}
            if request.temperature:
                body["seed"] = derive(request.seed, "sample", request.sample, data_sha256(request.prompt)) % 2**31
            if isinstance(request.prompt, str):
                return "/completions", body | {"prompt": request.prompt}, partial(_written, field=None)
            return "/chat/completions", body | {"messages": request.prompt}, partial(_written, field="message")
        if isinstance(request, Roll):
            raise UnsupportedError(
                "an endpoint gives no probability for a text's first token: rolling tasks need a local model"
            )
        assert isinstance(request, Score)
        if not isinstance(request.context, str) or not request.context.strip():
            raise UnsupportedError(
                "an endpoint scores only continuations of plain text: chat templates and unconditional scores need a local model"
            )
        text = request.context + request.continuation
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        return "/completions", body, partial(_scored, prompt=text, start=len(request.context.rstrip()))


def _written(answer: Any, field: str | None) -> Written:
    choice = answer["choices"][0]
    text = choice["text"] if field is None else (choice[field]["content"] or "")
    if not isinstance(text, str):
        raise BadAnswer(f"the text is {text!r:.40}")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswer(f"the answer didn't end: finish_reason {reason!r}")
    usage = answer.get("usage") or {}
    counts = [int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens")]
    return Written(text=text, finish_reason=reason, tokens=counts[0], prompt_tokens=counts[1])


def _scored(answer: Any, prompt: str, start: int) -> Scored:
    """The log-probability of the echoed characters of `prompt` from `start` on."""
    found = answer["choices"][0]["logprobs"]
    tokens, logprobs, offsets = found["tokens"], found["token_logprobs"], found["text_offset"]
    if not len(tokens) == len(logprobs) == len(offsets):
        raise BadAnswer("logprobs of several lengths")
    begun = logprobs[0] is None and not prompt.startswith(tokens[0])  # with a BOS token, which is spelled out
    shift = len(tokens[0]) if begun else 0
    places = [i for i, offset in enumerate(offsets) if start <= offset - shift < len(prompt) and (i or not begun)]
    if not places or offsets[places[0]] - shift != start:
        raise BadAnswer(
            "no token begins where the continuation does: the server doesn't echo prompts, or cuts words otherwise"
        )
    spelled = "".join(tokens[i] for i in places)
    if "bytes:" not in spelled and spelled != prompt[start:]:
        raise BadAnswer(f"the echoed tokens spell {spelled[:40]!r}, not {prompt[start:][:40]!r}")
    values = [logprobs[i] for i in places]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise BadAnswer("a token of the continuation has no log-probability")
    tops = [top or {} for top in found.get("top_logprobs") or [None] * len(tokens)]
    greedy = all(bool(tops[i]) and max(tops[i].values()) <= logprobs[i] + 1e-9 for i in places)
    return Scored(logprob=float(sum(values)), greedy=greedy, tokens=len(places))

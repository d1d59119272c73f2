"""Results and deltas of the engine in the shapes that OpenAI's clients read."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any

from luban.generate.session import TokenLogprob
from luban.serve.api.tool_formats import ToolCall
from luban.serve.request import Request
from luban.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
Logprobs = Sequence[TokenLogprob | int]  # an int: a token without any


class Written:
    """Counts the characters of a text that grows token by token."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.characters = 0

    def add(self, data: bytes) -> int:
        """Add a token; returns where it begins, or where the character begins that it is part of."""
        before = self.characters
        self.characters += len(self.decoder.decode(data))
        return before


class Shape:
    """One endpoint's way of writing choices. `chat` or plain completions, whole or in chunks."""

    def __init__(self, *, chat: bool, model: str, tokenizer: Tokenizer):
        self.chat, self.model, self.tokenizer = chat, model, tokenizer
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.written: dict[int, Written] = {}  # of each choice, for completions' log-probabilities

    def body(
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A response, or one chunk of a stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        head = {
            "id": self.id,
            "object": f"{kind}.chunk" if self.chat and chunk else kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return head if usage is None else {**head, "usage": usage}

    def choice(
        self,
        index: int,
        text: str,
        logprobs: Logprobs | None,
        reason: str | None,
        *,
        chunk: bool,
        calls: Sequence[ToolCall] = (),
        first_call: int = 0,
    ) -> dict[str, Any]:
        """One choice with the text so far, or what a chunk adds to it.

        Args:
            calls: of tools, with it.
            first_call: calls that earlier chunks held.
        """
        head: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self.logprobs(index, logprobs)}
        if not self.chat:
            return {**head, "text": text}
        if not chunk:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text.strip() or None, "tool_calls": [call.as_openai() for call in calls]}
            return {**head, "message": message}
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            delta["tool_calls"] = [call.as_openai(first_call + number) for number, call in enumerate(calls)]
        return {**head, "delta": delta}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def logprobs(self, index: int, found: Logprobs | None) -> dict[str, Any] | None:
        """Log-probabilities of the model's own distribution, before penalties, masks, temperature and filters; beside them,
        as `sampling_logprob`, of the distribution that the token was drawn from.

        Args:
            found: None in the place of a prompt's first token, which nothing predicts, as its id alone.
        """
        if found is None:
            return None
        if self.chat:
            content = []
            for entry in found:
                assert isinstance(entry, TokenLogprob)  # chats have no echo
                top = [self._named(*pair) for pair in entry.top]
                content.append({**self._named(entry.token, entry.logprob), "top_logprobs": top, **_sampling(entry)})
            return {"content": content, "refusal": None}
        written = self.written.setdefault(index, Written())
        tokens = [entry if isinstance(entry, int) else entry.token for entry in found]
        entries = [None if isinstance(entry, int) else entry for entry in found]
        return {
            "tokens": [self._word(token) for token in tokens],
            "text_offset": [written.add(self.tokenizer.token_bytes(token)) for token in tokens],
            "token_logprobs": [entry and finite(entry.logprob) for entry in entries],
            "top_logprobs": [entry and self._distinct(entry.top) for entry in entries],
            "sampling_logprobs": [entry and _sampling(entry).get("sampling_logprob") for entry in entries],
        }

    def prompt_logprobs(self, found: list[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """Of a prompt's tokens, by token id, with the token's own and the likeliest (vLLM's field of this name)."""
        listed = []
        for entry in found:
            pairs = [] if entry is None else [(entry.token, entry.logprob), *entry.top]
            named = {str(i): {"logprob": finite(p), "decoded_token": self._word(i)} for i, p in reversed(pairs)}
            listed.append(named or None)
        return listed

    def _distinct(self, top: list[tuple[int, float]]) -> dict[str, float]:
        """Log-probabilities by token text; of tokens with the same text, all but the likeliest by their ids."""
        found: dict[str, float] = {}
        for token, logprob in top:
            word = self._word(token)
            found[f"token_id:{token}" if word in found else word] = finite(logprob)
        return found

    def _word(self, token: int) -> str:
        """A token's text, its space before it included; part of a character is spelled as OpenAI does, `bytes:\\xe6`."""
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._word(token),
            "logprob": finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)),
        }


def _sampling(entry: TokenLogprob) -> dict[str, float]:
    """The log-probability under the distribution that was drawn from, where the token was drawn."""
    return {} if entry.sampling_logprob is None else {"sampling_logprob": finite(entry.sampling_logprob)}


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it: −∞, which a forced token gives all others, as OpenAI's −9999."""
    return max(logprob, LEAST_LOGPROB)


def usage(requests: list[Request]) -> dict[str, Any]:
    """Token counts: prompts once each, with how many of their tokens the prefix cache held, and everything generated, end
    tokens included."""
    prompt = sum(len(request.prompt) for request in requests)
    made = sum(len(choice.token_ids) for request in requests for choice in request.result.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in requests)},
    }

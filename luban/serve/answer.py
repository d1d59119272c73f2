"""Results and deltas of the engine in the shapes that OpenAI's clients read."""

from __future__ import annotations

import codecs
import time
import uuid
from typing import Any

from luban.generate.session import TokenLogprob
from luban.serve.engine import Request
from luban.tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0


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
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: dict[str, int] | None = None
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
        self, index: int, text: str, logprobs: list[TokenLogprob] | None, reason: str | None, *, chunk: bool
    ) -> dict[str, Any]:
        """One choice with the text so far, or what a chunk adds to it."""
        head: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": self.logprobs(index, logprobs)}
        if not self.chat:
            return {**head, "text": text}
        if not chunk:
            return {**head, "message": {"role": "assistant", "content": text, "refusal": None}}
        return {**head, "delta": {"content": text} if text else {}}

    def opening(self, index: int) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def logprobs(self, index: int, found: list[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of the model's own distribution, before temperature and filters."""
        if found is None:
            return None
        if self.chat:
            return {
                "content": [
                    {
                        **self._named(entry.token, entry.logprob),
                        "top_logprobs": [self._named(*pair) for pair in entry.top],
                    }
                    for entry in found
                ],
                "refusal": None,
            }
        written = self.written.setdefault(index, Written())
        offsets = [written.add(self.tokenizer.token_bytes(entry.token)) for entry in found]
        return {
            "tokens": [self._word(entry.token) for entry in found],
            "text_offset": offsets,
            "token_logprobs": [finite(entry.logprob) for entry in found],
            "top_logprobs": [self._distinct(entry.top) for entry in found],
        }

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


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it: −∞, which a forced token gives all others, as OpenAI's −9999."""
    return max(logprob, LEAST_LOGPROB)


def usage(requests: list[Request]) -> dict[str, int]:
    """Token counts: prompts once each, and everything generated, end tokens included."""
    prompt = sum(len(request.prompt) for request in requests)
    made = sum(len(choice.token_ids) for request in requests for choice in request.result.choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

"""Chats whose questions are answered by something else than the engine (`luban.core.protocols.Answerer`)."""

from __future__ import annotations

from typing import Any

from luban.core.errors import DataError
from luban.core.protocols import Answered
from luban.generate.sampling import Sampling
from luban.serve.api.chat_body import ChatBody
from luban.serve.request import Choice, Delta, FinishReason, Request

# fields that are read, and those that say how tokens are drawn, which beam search doesn't
READ = frozenset({"model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "priority"})
DRAWING = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})


def question_of(body: ChatBody, messages: list[dict[str, Any]]) -> str:
    """The last message of a conversation. Raises DataError unless it is a user's, and for fields that would be ignored."""
    for name in sorted(body.model_fields_set - READ - DRAWING):
        if getattr(body, name) != type(body).model_fields[name].default:
            raise DataError(
                f"'{name}' is not supported: this model's answers are found by beam search over its passages"
            )
    last = messages[-1]
    if last["role"] != "user" or not (last["content"] or "").strip():
        raise DataError("an index answers questions: the last message must be a user's, with text")
    return last["content"]


def reason_of(found: Answered) -> FinishReason:
    """Why an answer ended."""
    return "stop" if found.ended else "length"


def answered_request(found: Answered, sampling: Sampling) -> Request:
    """A request that is done, with the answer as its result."""
    request = Request(found.prompt_token_ids, sampling)
    request.result.choices = [Choice(text=found.text, token_ids=found.token_ids, finish_reason=reason_of(found))]
    return request


def answered_delta(found: Answered) -> Delta:
    """The whole answer as the one delta of a stream."""
    return Delta(choice=0, text=found.text, token_ids=found.token_ids, logprobs=None, finish_reason=reason_of(found))

"""POST /tokenize and /detokenize, with the fields of vLLM's."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field

from luban.core.errors import DataError
from luban.load.model import LoadedModel
from luban.serve.api.chat_body import MAX_MESSAGES, Message, Tool
from luban.tokenizer.chat import render

MAX_TOKENS = 1 << 22  # that are turned into text at once


class TokenizeBody(BaseModel):
    """A text, or a conversation up to where the answer begins."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True  # begin a text as the model's documents begin
    messages: list[Message] | None = Field(None, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    def tokens(self, model: LoadedModel) -> list[int]:
        """The token ids. Raises DataError unless there is exactly one of prompt and messages, and as `render` does."""
        tokenizer = model.need_tokenizer()
        if (self.prompt is None) == (self.messages is None):
            raise DataError("/tokenize needs either 'prompt' or 'messages'")
        if self.prompt is not None:
            return tokenizer.encode(self.prompt, bos=self.add_special_tokens and model.begins_with_bos)
        messages = [message.plain() for message in self.messages or ()]
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return render(messages, tokenizer, add_generation_prompt=self.add_generation_prompt, tools=tools).token_ids

    def answer(self, model: LoadedModel) -> dict[str, Any]:
        """The response."""
        ids = self.tokens(model)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": model.spec.context, "tokens": ids}
        if self.return_token_strs:
            found["token_strs"] = [model.need_tokenizer().token(token) for token in ids]
        return found


class DetokenizeBody(BaseModel):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()] = Field(max_length=MAX_TOKENS)

    def answer(self, model: LoadedModel) -> dict[str, str]:
        """The response: their text, special tokens spelled. Raises DataError for ids outside of the vocabulary."""
        tokenizer = model.need_tokenizer()
        if self.tokens and not 0 <= min(self.tokens) <= max(self.tokens) < tokenizer.vocab_size:
            raise DataError(f"'tokens' holds ids outside the vocabulary of {tokenizer.vocab_size}")
        return {"prompt": tokenizer.decode(self.tokens, skip_special=False)}

"""How models that write text take a prompt: a decoder continues it, an encoder–decoder reads it as its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luban.core.errors import UnsupportedError
from luban.generate.cache import ContextError, PromptTooLong
from luban.models.base import require_next_token
from luban.models.spec import ModelSpec

if TYPE_CHECKING:
    from luban.generate.session import Sequence


class DecoderPrompts:
    """A decoder's prompt is the beginning of its own tokens.

    Args:
        spec: of the model.

    Raises:
        UnsupportedError: a model that doesn't predict the next token step by step.
    """

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.require()

    def require(self) -> None:
        """Raise UnsupportedError unless the model writes text."""
        require_next_token(self.spec, "generating text", cached=True)

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a prompt is empty, too long, or holds ids outside the vocabulary."""
        self._check_ids(prompt)
        if len(prompt) >= self.spec.context:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens, and the model's context of {self.spec.context} "
                "must also hold the answer: shorten the prompt"
            )

    def _check_ids(self, prompt: list[int]) -> None:
        """Raise ContextError where a prompt is empty or holds ids outside the vocabulary."""
        if not prompt:
            raise ContextError("the prompt is empty: at least one token is needed")
        if not 0 <= min(prompt) <= max(prompt) < self.spec.vocab_size:
            raise ContextError(f"the prompt holds token ids outside the model's vocabulary of {self.spec.vocab_size}")

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Tokens of an answer that the context holds."""
        return self.spec.context - len(prompt)

    def first_tokens(self, prompt: list[int]) -> list[int]:
        """What the decoder reads before it generates."""
        return list(prompt)

    def source(self, prompt: list[int]) -> list[int]:
        """What the encoder reads; empty for a decoder alone."""
        return []

    def seen(self, sequence: Sequence) -> list[int]:
        """The tokens that a penalty on repetition counts."""
        return sequence.prompt + sequence.tokens

    def forced(self, sequence: Sequence) -> int | None:
        """The token that must come next; None: it is predicted."""
        return None


class SourcePrompts(DecoderPrompts):
    """An encoder–decoder's prompt is its source; the decoder begins with the token that the body names.

    Raises:
        UnsupportedError: another head than language_model, or a body that names no first token.
    """

    def require(self) -> None:
        """Raise UnsupportedError unless the model writes text."""
        head = self.spec.head.registry.name_of(type(self.spec.head))
        if head != "language_model":
            raise UnsupportedError(f"generating text needs a language_model head; this encoder–decoder has head {head}")
        if self.spec.body.decoder_start_ids() is None:
            raise UnsupportedError(
                "this encoder–decoder doesn't say which token its decoder begins with: give the id as "
                "body.decoder_start of its spec.json (decoder_start_token_id of a config.json)"
            )

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a source is empty, too long, or holds ids outside the vocabulary."""
        self._check_ids(prompt)
        if len(prompt) > self.spec.context:
            raise PromptTooLong(
                f"the source has {len(prompt)} tokens, and the model reads {self.spec.context} at most: shorten it"
            )

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Tokens of an answer that the decoder holds after its first."""
        return self.spec.context - 1

    def first_tokens(self, prompt: list[int]) -> list[int]:
        """The start token; one that always follows it counts as generated, as in transformers."""
        return [self._start_ids[0]]

    def source(self, prompt: list[int]) -> list[int]:
        """The prompt."""
        return prompt

    def seen(self, sequence: Sequence) -> list[int]:
        """The decoder's tokens: the source may be repeated."""
        return [self._start_ids[0], *sequence.tokens]

    def forced(self, sequence: Sequence) -> int | None:
        """The body's second token after the first, where it names one."""
        return self._start_ids[1] if not sequence.tokens and len(self._start_ids) > 1 else None

    @property
    def _start_ids(self) -> tuple[int, ...]:
        ids = self.spec.body.decoder_start_ids()
        assert ids is not None  # `require` refused the model otherwise
        return ids


def prompts_of(spec: ModelSpec) -> DecoderPrompts:
    """How a model takes prompts. UnsupportedError for one that writes no text."""
    return SourcePrompts(spec) if spec.body.two_sided else DecoderPrompts(spec)

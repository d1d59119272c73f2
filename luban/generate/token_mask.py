"""The mask over the next token that keeps a text within its `Structure`, by llguidance.

B rows, V vocabulary, W = ⌈V / 32⌉ words of a row's bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luban.core.errors import ConfigError, LubanError, MissingExtra
from luban.generate.structure import WHITESPACE, Structure
from luban.generate.structure_errors import plain
from luban.tokenizer.tokenizer import Tokenizer

BITS = 32  # of a word


class StructureError(LubanError):
    """A structure that can't be followed further, such as one whose parsing exceeds the library's limits."""


class Matcher:
    """Where one text stands in its structure; made by `StructureCompiler.matcher`."""

    def __init__(self, matcher: Any, words: int, executor: Any):
        self._matcher, self.words, self._executor = matcher, words, executor  # W of its mask; threads of the library

    def copy(self) -> Matcher:
        """Another text that begins like this one."""
        return Matcher(self._matcher.deep_copy(), self.words, self._executor)

    def consume(self, token: int) -> bool:
        """Go on by a token. False: the structure doesn't allow it, and the matcher is of no more use."""
        return self._matcher.is_stopped() or self._matcher.consume_token(token)

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens that were consumed."""
        if tokens:
            self._matcher.rollback(tokens)

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> StructureError | None:
        """What broke, if anything did."""
        if not self._matcher.is_error():
            return None
        return StructureError(f"the structure can't be followed: {self._matcher.get_error().splitlines()[0]}")

    @staticmethod
    def write_masks(matchers: Sequence[Matcher], words_BW: Tensor) -> None:
        """Set a bit for every token that may follow in each text, several texts in parallel.

        Args:
            matchers: of one compiler.
            words_BW: int32, on the CPU, contiguous.
        """
        rows = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
        bytes_a_row = words_BW.shape[1] * words_BW.element_size()
        if len(rows) == 1:
            rows[0][0].unsafe_compute_mask_ptr(words_BW.data_ptr(), bytes_a_row)
        elif rows:
            matchers[0]._executor.unsafe_compute_mask_ptr(rows, words_BW.data_ptr(), bytes_a_row, len(rows))


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int):
        self.tokenizer, self.eos_token_id, self.bos_token_id = tokenizer, end, None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        surplus = range(len(self.tokens), max(vocab_size, end + 1))
        self.tokens += [f"<unused {token}>".encode() for token in surplus]
        self.special_token_ids = sorted({*tokenizer.special.values(), *surplus})  # no text contains them

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


class StructureCompiler:
    """Makes matchers for one vocabulary; what that costs (a second for 50,000 tokens) is paid with the first. Safe from any
    thread.

    Args:
        tokenizer: gives the bytes of tokens.
        vocab_size: V of the logits, at least the tokenizer's.
        stop_ids: tokens that may end a whole text. Without any a text ends where nothing can follow it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.stop_ids = list(stop_ids) or [vocab_size]  # an id that no logit has
        self._lock, self._library, self._executor = threading.Lock(), None, None  # made with the first matcher

    def matcher(self, structure: Structure) -> Matcher:
        """A matcher at the beginning of a text.

        Raises:
            ConfigError: the structure isn't valid, or has what the library doesn't know; says where.
            MissingExtra: llguidance isn't installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise MissingExtra("llguidance", "serve", "structured output") from None
        if structure.kind == "json_schema":
            options = {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}
            try:
                grammar = LLMatcher.grammar_from_json_schema(structure.source, defaults=options)  # type: ignore[arg-type]
            except ValueError as error:
                raise _refused(structure, str(error)) from None
        elif structure.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(structure.source)
        else:
            grammar = LLMatcher.grammar_from_lark(structure.source)
        library = self._tokens()
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, library)
        if wrong:
            raise _refused(structure, "\n".join(messages))
        matcher = LLMatcher(library, grammar, log_level=0)
        first = matcher.deep_copy()  # what the validation lets pass shows in the first mask
        try:
            allowed, problem = any(first.compute_bitmask()), first.get_error()
        except ValueError as error:
            allowed, problem = False, str(error)
        if problem:
            raise _refused(structure, problem.partition("\n")[0])
        if not allowed:
            raise _refused(structure, "it allows no text of this model's tokens")
        return Matcher(matcher, -(-library.vocab_size // BITS), self._executor)

    def _tokens(self) -> Any:
        from llguidance import LLExecutor, LLTokenizer

        with self._lock:
            if self._library is None:
                self._executor = LLExecutor()
                vocabulary = _Vocabulary(self.tokenizer, self.vocab_size, self.stop_ids[0])
                self._library = LLTokenizer(vocabulary, eos_token=self.stop_ids)  # type: ignore[arg-type]
            return self._library


def _refused(structure: Structure, message: str) -> ConfigError:
    """The error of a structure of which the library says this."""
    said = plain(message, structure.kind, structure.source)
    return ConfigError(f"the {structure.kind.replace('_', ' ')} can't be followed: {said}")


def mask_logits(logits_BV: Tensor, matchers: Sequence[Matcher | None]) -> Tensor:
    """Logits with −∞ for tokens that a row's structure doesn't allow. Rows without a matcher are as they were, and where no
    row has one the argument itself is returned."""
    rows = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return logits_BV
    vocab_size = logits_BV.shape[1]
    on_gpu = logits_BV.device.type == "cuda"
    words_BW = torch.zeros(len(rows), rows[0][1].words, dtype=torch.int32, pin_memory=on_gpu)
    Matcher.write_masks([matcher for _, matcher in rows], words_BW)
    words_BW = words_BW.to(logits_BV.device, non_blocking=True)
    allowed_BV = (
        (words_BW[:, :, None] >> torch.arange(BITS, device=logits_BV.device) & 1).flatten(1)[:, :vocab_size].bool()
    )
    index = torch.tensor([row for row, _ in rows], device=logits_BV.device)
    return logits_BV.index_copy(0, index, logits_BV[index].masked_fill(~allowed_BV, float("-inf")))

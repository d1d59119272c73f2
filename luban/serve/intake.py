"""From prompts to requests: what is tokenised, what is refused before anything runs."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from luban.core.errors import DataError
from luban.generate.cache import PromptTooLong
from luban.generate.sampling import Sampling
from luban.generate.token_mask import Matcher, StructureCompiler
from luban.load.model import LoadedModel
from luban.serve.batch import Batch
from luban.serve.request import Delta, Prompt, Request
from luban.tokenizer.chat import render

FIRST_CHARACTERS = 8  # a token of the context: what is tokenised first of a long text
COUNTED = (
    1 << 18
)  # characters of a text that are tokenised in any case, so that the error can say how many tokens it has
BROKEN = 64  # tokens at the end of a cut text that may be fewer where it isn't cut


class Intake:
    """Makes requests for one model; safe from any thread.

    Args:
        batch: that the requests will run in, whose limits they must keep.
    """

    def __init__(self, model: LoadedModel, batch: Batch):
        self.model, self.batch = model, batch
        self._lock, self._structures = threading.Lock(), cast(StructureCompiler | None, None)

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids: text (begun as the model's documents begin), ids, or a conversation's messages.

        Raises DataError (ContextError when it is empty or fills the context).
        """
        if isinstance(prompt, str):
            self.require_room(prompt)
            source = self.model.spec.body.two_sided
            ids = self.model.need_tokenizer().encode(
                prompt, bos=self.model.begins_with_bos, eos=source and self.model.ends_with_eos
            )
        elif len(prompt) > 0 and isinstance(prompt[0], Mapping):
            ids = render(
                cast(Sequence[Mapping[str, Any]], prompt), self.model.need_tokenizer(), add_generation_prompt=True
            ).token_ids
        else:
            ids = _token_ids(prompt)
        self.batch.check(ids)
        return ids

    def require_room(self, text: str, counted: int = COUNTED) -> None:
        """Raise PromptTooLong for a text much longer than the context, at the cost of tokenising a beginning of it, however long
        the text is: `counted` characters, or what is about twice as long as the context if that is more."""
        context = self.model.spec.context
        size = max(FIRST_CHARACTERS * context, counted)
        while size < len(text):
            found = len(self.model.need_tokenizer().encode(text[:size]))
            if found > 2 * context + BROKEN:
                raise PromptTooLong(
                    f"the prompt has more than {found - BROKEN} tokens (its first {size} characters of {len(text)} have as many), "
                    f"and the model's context of {context} must also hold the answer: shorten the prompt"
                )
            size *= 2

    def request(
        self,
        prompt: Prompt,
        sampling: Sampling,
        listener: Callable[[Delta], None] | None = None,
        *,
        priority: int = 0,
        kept: frozenset[int] = frozenset(),
    ) -> Request:
        """A request for one prompt. An answer to messages, or of a decoder to its encoder's text, is a text of its own.

        Args:
            priority, kept: as in `Request`.

        Raises DataError as `tokens_of` does, ConfigError for a structure that can't be followed, and RequestTooLarge where
        its keys and values would never fit.
        """
        source = self.model.spec.body.two_sided
        messages = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self.tokens_of(prompt)
        if sampling.prompt_logprobs is not None and source:
            raise DataError("an encoder–decoder predicts no token of its source: it has no prompt_logprobs")
        self.batch.budget.require(ids, sampling)
        return Request(
            ids,
            sampling,
            listener,
            ends=self._ends(sampling),
            matcher=self._matcher(sampling),
            priority=priority,
            kept=kept,
            continues=not source and not messages,
        )

    def _ends(self, sampling: Sampling) -> tuple[int, ...]:
        """Tokens that end a text. Raises DataError for one outside of the vocabulary."""
        ids = (*sampling.stop_token_ids, *(token for token, _ in sampling.logit_bias))
        if ids and max(ids) >= self.model.spec.vocab_size:
            raise DataError(f"token id {max(ids)} is outside the model's vocabulary of {self.model.spec.vocab_size}")
        return (*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.model.stop_ids))

    def _matcher(self, sampling: Sampling) -> Matcher | None:
        """Of the structure that is asked for."""
        if sampling.structure is None:
            return None
        with self._lock:
            if self._structures is None:
                tokenizer, size = self.model.need_tokenizer(), self.model.spec.vocab_size
                self._structures = StructureCompiler(tokenizer, size, self.model.stop_ids)
        return self._structures.matcher(sampling.structure)


def is_one(prompts: Any) -> bool:
    """Whether this is a single prompt rather than a list of them."""
    return isinstance(prompts, str) or (
        len(prompts) > 0
        and (isinstance(prompts[0], Mapping) or (hasattr(prompts[0], "__index__") and _scalar(prompts[0])))
    )


def _scalar(value: Any) -> bool:
    """Whether a value that may be an array is a single number."""
    return getattr(value, "ndim", 0) == 0


def _token_ids(prompt: Any) -> list[int]:
    """Token ids of a list, or of an array or tensor of whole numbers. Raises DataError for anything else."""
    try:
        ids = [operator.index(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
        if not any(isinstance(token, bool) for token in prompt):
            return ids
    except TypeError:
        pass
    raise DataError("a prompt is a string, a list of token ids, or a list of messages")

"""The engine: requests in, text out, everything that runs together batched a token at a time."""

from __future__ import annotations

import operator
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from luban.core.errors import DataError
from luban.core.log import warn
from luban.core.seeding import derive
from luban.generate.cache import ContextError
from luban.generate.sampling import Sampling
from luban.generate.session import NotFiniteError, TokenLogprob
from luban.generate.session import Sequence as Growing
from luban.generate.source import session_for
from luban.generate.text import TextStream
from luban.load.model import LoadedModel
from luban.serve.memory import CacheBudget
from luban.tokenizer.chat import render

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
FinishReason = Literal["stop", "length", "cancelled"]
MAX_BATCH = 32  # sequences that grow together
MAX_PREFILL = 16_384  # tokens, padding included, of prompts that are read together
FIRST_CHARACTERS = 8  # a token of the context: what is tokenised first of a long text


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to one continuation."""

    choice: int  # which of the n
    text: str  # may be empty while a character or a stop string is undecided
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None  # set on the last delta of a continuation


@dataclass
class Choice:
    """One finished continuation."""

    text: str = ""  # without the end token and without a stop string
    token_ids: list[int] = field(default_factory=list)  # as generated, the end token included
    logprobs: list[TokenLogprob] | None = None  # one a token, where asked for
    finish_reason: FinishReason | None = None  # stop: an end token or a stop string; length: max_tokens or the context


@dataclass
class Result:
    """The continuations of one prompt; `text` and the rest speak of the first."""

    prompt_token_ids: list[int]
    choices: list[Choice]

    @property
    def text(self) -> str:
        """Text of the first continuation."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, the end token included."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Its log-probabilities, where asked for."""
        return self.choices[0].logprobs


class Request:
    """A prompt on its way. `deltas` are handed to `listener` as they come, and collected in `result`.

    Args:
        continues: whether the generated text continues the prompt's, so that a space between them belongs to it.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        listener: Callable[[Delta], None] | None = None,
        *,
        continues: bool = False,
    ):
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.prompt, self.sampling, self.listener, self.continues = prompt, sampling, listener, continues
        self.growing = [Growing(prompt, sampling, derive(seed, "request"), choice) for choice in range(sampling.n)]
        empty = None if sampling.logprobs is None else []
        self.result = Result(prompt, [Choice(logprobs=None if empty is None else []) for _ in range(sampling.n)])
        self.cancelled = False
        self.error: Exception | None = None  # what broke the request, if anything did

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return all(choice.finish_reason for choice in self.result.choices)

    def cancel(self) -> None:
        """Stop generating at the next step; safe from any thread."""
        self.cancelled = True


class Engine:
    """Generates text with a model.

    `generate` and `stream` run in the caller's thread. A server instead calls `submit` from any thread and
    `step` from one thread of its own; requests join the running batch as they come and leave it as they end.

    Args:
        model: from `luban.load_model`.
        max_batch: sequences that grow together; more wait.
        cache_bytes: memory for keys and values; requests wait until theirs fit. None: half of what the device has free.
    """

    def __init__(self, model: LoadedModel, *, max_batch: int = MAX_BATCH, cache_bytes: int | None = None):
        self.model, self.max_batch = model, max_batch
        self.session = session_for(model.module)
        if model.generation.unbuilt:
            warn(
                f"{model.name}: its authors ask for {', '.join(model.generation.unbuilt)} (generation_config.json), which "
                "isn't built, so its text may differ from what they get"
            )
        self.budget = CacheBudget.of(model.module, cache_bytes)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, tuple[Request, TextStream | None]] = {}  # by id of its growing sequence
        self._stepping = threading.Lock()

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids: text (begun as the model's documents begin), ids, or a conversation's messages.

        Raises DataError (ContextError when it is empty or leaves no room in the context).
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
        self.session.check(ids)
        return ids

    def require_room(self, text: str) -> None:
        """Raise ContextError for a text much longer than the context, at the cost of tokenising a beginning of it that is
        about twice as long as the context, however long the text is."""
        context, size = self.model.spec.context, FIRST_CHARACTERS * self.model.spec.context
        while size < len(text):
            if len(self.model.need_tokenizer().encode(text[:size])) > 2 * context:
                raise ContextError(
                    f"a prompt of {len(text)} characters has more tokens than the model's context of {context}: shorten it"
                )
            size *= 2

    def request(self, prompt: Prompt, sampling: Sampling, listener: Callable[[Delta], None] | None = None) -> Request:
        """A request for one prompt. An answer to messages, or of a decoder to its encoder's text, is a text of its own.

        Raises DataError as `tokens_of` does, and RequestTooLarge where its keys and values would never fit.
        """
        source = self.model.spec.body.two_sided
        messages = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self.tokens_of(prompt)
        self.budget.require(ids, sampling.max_tokens, sampling.n)
        return Request(ids, sampling, listener, continues=not source and not messages)

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None) -> list[Result]:
        """Continue every prompt; the results come in the order of the prompts. Without `sampling` tokens are chosen as
        the model's generation_config.json says, or as `Sampling()` does.

        Raises DataError for a prompt that is empty, malformed or longer than the context, before any is run, and
        NotFiniteError where the model's logits are NaN or infinite.
        """
        sampling = sampling or self.model.generation.sample({})
        several = cast(Sequence[Prompt], [prompts] if _is_one(prompts) else prompts)
        requests = [self.request(prompt, sampling) for prompt in several]
        for request in requests:
            self.submit(request)
        while not all(request.done for request in requests):
            self.step()
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.result for request in requests]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Delta]:
        """Continue one prompt, a delta at a time, `sampling` as in `generate`. Closing the iterator stops the generation."""
        arrived: deque[Delta] = deque()
        request = self.request(prompt, sampling or self.model.generation.sample({}), arrived.append)
        self.submit(request)
        try:
            while not request.done or arrived:
                while arrived:
                    yield arrived.popleft()
                if not request.done:
                    self.step()
            if request.error is not None:
                raise request.error
        finally:
            if not request.done:
                request.cancel()
                self.step()

    def submit(self, request: Request) -> None:
        """Queue a request; safe from any thread."""
        self.waiting.append(request)

    def step(self) -> bool:
        """One token for every running sequence. Returns whether there is more to do."""
        with self._stepping:
            self._admit()
            if self.session.sequences:
                tokens = self.session.choose()
                pairs = list(zip(self.session.sequences, tokens, strict=True))
                self.session.advance([sequence for sequence, token in pairs if not self._took(sequence, token)])
            return bool(self.session.sequences or self.waiting)

    def _admit(self) -> None:
        """Move waiting requests into the batch, in their order, while they fit; one larger than the batch runs alone."""
        fresh: list[Request] = []
        while self.waiting:
            request = self.waiting[0]
            if not request.cancelled and not self._has_room(fresh, request):
                break
            self.waiting.popleft()
            if request.cancelled:
                self._cancel(request)
            else:
                fresh.append(request)
        self._start(fresh)

    def _has_room(self, fresh: list[Request], request: Request) -> bool:
        """Whether `request` may run beside what runs and the `fresh` ones: by number, by memory once all have grown to
        their end, and by the tokens of prompts that are read in one step."""
        others = [*self.session.sequences, *(growing for other in fresh for growing in other.growing)]
        if not others:
            return True
        if len(others) + len(request.growing) > self.max_batch:
            return False
        if fresh:
            prompts = [len(other.prompt) for other in (*fresh, request)]
            if len(prompts) * max(prompts) > MAX_PREFILL:
                return False
        grown = [self.budget.tokens(g.prompt, g.sampling.max_tokens) for g in (*others, *request.growing)]
        return self.budget.holds(grown)

    def _start(self, requests: list[Request]) -> None:
        """Read the prompts of requests together; where that fails one by one, so that none fails for another's sake."""
        try:
            for request in requests:
                self.budget.require(request.prompt, request.sampling.max_tokens, request.sampling.n)
            self.session.add([growing for request in requests for growing in request.growing])
        except Exception as error:
            if len(requests) == 1:
                self._break(requests[0], error)
            else:
                for request in requests:
                    self._start([request])
            return
        for request in requests:
            for growing in request.growing:
                text = None
                if self.model.tokenizer is not None:
                    context = request.prompt if request.continues else ()
                    text = TextStream(self.model.tokenizer, request.sampling.stop, context)
                self.running[id(growing)] = (request, text)

    def _took(self, growing: Growing, token: int | None) -> bool:
        """Hand out what `token` means for its request; returns whether the continuation has ended."""
        request, stream = self.running[id(growing)]
        choice, sampling = request.result.choices[growing.choice], growing.sampling
        if token is None:
            self._break(request, NotFiniteError())
        if request.cancelled or token is None:
            del self.running[id(growing)]
            choice.finish_reason = "cancelled"
            return True
        choice.token_ids.append(token)
        ended = token in self.model.stop_ids and not sampling.ignore_eos
        text = "" if ended or stream is None else stream.push(token)
        reason: FinishReason | None = None
        if ended or (stream is not None and stream.stopped):
            reason = "stop"
        elif len(growing.tokens) >= sampling.max_tokens or self.session.full(growing):
            reason = "length"
        if reason and stream is not None:
            text += stream.finish()
            reason = "stop" if stream.stopped else reason
        new = [growing.logprobs[-1]] if sampling.logprobs is not None else None
        choice.text += text
        if choice.logprobs is not None and new:
            choice.logprobs += new
        if reason:
            del self.running[id(growing)]
            choice.finish_reason = reason
        if request.listener:
            request.listener(
                Delta(choice=growing.choice, text=text, token_ids=[token], logprobs=new, finish_reason=reason)
            )
        return reason is not None

    def _cancel(self, request: Request) -> None:
        for choice in request.result.choices:
            choice.finish_reason = choice.finish_reason or "cancelled"

    def _break(self, request: Request, error: Exception) -> None:
        """End every continuation of one request with an error; the sequences that run leave at the end of the step."""
        if request.error is not None:
            return
        request.error = error
        request.cancel()
        self._cancel(request)
        if request.listener:
            request.listener(Delta(choice=0, text="", token_ids=[], logprobs=None, finish_reason="cancelled"))

    def fail(self, error: Exception) -> None:
        """Give up everything queued and running, after an error that no request caused alone."""
        with self._stepping:
            broken = {id(r): r for r in [*self.waiting, *(request for request, _ in self.running.values())]}
            self.waiting.clear()
            self.running.clear()
            self.session = session_for(self.model.module)
            for request in broken.values():
                self._break(request, error)


def _is_one(prompts: Any) -> bool:
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

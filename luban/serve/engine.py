"""The engine: requests in, text out, everything that runs together batched a token at a time."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from luban.core.errors import DataError
from luban.core.log import warn
from luban.core.seeding import derive
from luban.generate.sampling import Sampling
from luban.generate.session import NotFiniteError, TokenLogprob
from luban.generate.session import Sequence as Growing
from luban.generate.source import session_for
from luban.generate.text import TextStream
from luban.load.model import LoadedModel
from luban.tokenizer.chat import render

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
FinishReason = Literal["stop", "length", "cancelled"]
MAX_BATCH = 32  # sequences that grow together


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
    """

    def __init__(self, model: LoadedModel, *, max_batch: int = MAX_BATCH):
        self.model, self.max_batch = model, max_batch
        self.session = session_for(model.module)
        if model.generation.unbuilt:
            warn(
                f"{model.name}: its authors ask for {', '.join(model.generation.unbuilt)} (generation_config.json), which "
                "isn't built, so its text may differ from what they get"
            )
        self.waiting: deque[Request] = deque()
        self.running: dict[int, tuple[Request, TextStream | None]] = {}  # by id of its growing sequence
        self._stepping = threading.Lock()

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """A prompt as token ids: text (begun as the model's documents begin), ids, or a conversation's messages.

        Raises DataError (ContextError when it is empty or leaves no room in the context).
        """
        if isinstance(prompt, str):
            source = self.model.spec.body.two_sided
            ids = self.model.need_tokenizer().encode(
                prompt, bos=self.model.begins_with_bos, eos=source and self.model.ends_with_eos
            )
        elif prompt and isinstance(prompt[0], Mapping):
            ids = render(
                cast(Sequence[Mapping[str, Any]], prompt), self.model.need_tokenizer(), add_generation_prompt=True
            ).token_ids
        elif all(isinstance(token, int) for token in prompt):
            ids = list(cast(Sequence[int], prompt))
        else:
            raise DataError("a prompt is a string, a list of token ids, or a list of messages")
        self.session.check(ids)
        return ids

    def request(self, prompt: Prompt, sampling: Sampling, listener: Callable[[Delta], None] | None = None) -> Request:
        """A request for one prompt. An answer to messages, or of a decoder to its encoder's text, is a text of its own.

        Raises DataError as `tokens_of` does.
        """
        source = self.model.spec.body.two_sided
        messages = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        return Request(self.tokens_of(prompt), sampling, listener, continues=not source and not messages)

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
        """Move waiting requests into the batch while there is room; one larger than the batch runs alone."""
        fresh: list[Growing] = []
        while self.waiting:
            request = self.waiting[0]
            busy = len(self.session.sequences) + len(fresh)
            if busy and busy + len(request.growing) > self.max_batch:
                break
            self.waiting.popleft()
            if request.cancelled:
                self._cancel(request)
                continue
            for growing in request.growing:
                text = None
                if self.model.tokenizer is not None:
                    context = request.prompt if request.continues else ()
                    text = TextStream(self.model.tokenizer, request.sampling.stop, context)
                self.running[id(growing)] = (request, text)
            fresh += request.growing
        self.session.add(fresh)

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
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, Mapping)))

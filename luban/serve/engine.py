"""The engine: requests in, text out, everything that runs together batched a token at a time."""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from luban.core.errors import DataError, LubanError
from luban.core.log import warn
from luban.core.plan import ParallelPlan
from luban.generate.beam import Answers
from luban.generate.sampling import Sampling
from luban.generate.session import NotFiniteError
from luban.generate.session import Sequence as Growing
from luban.generate.text import TextStream
from luban.generate.token_mask import StructureError
from luban.load.model import LoadedModel
from luban.load.writer import writer_of
from luban.serve.adapters import MOST, AdapterPool
from luban.serve.batch import BatchLoad, Token
from luban.serve.intake import Intake, is_one
from luban.serve.make_batch import BatchOptions, make_batch
from luban.serve.memory import CacheBudget
from luban.serve.request import Delta, FinishReason, News, Prompt, Request, Result, Running
from luban.serve.speculation import DRAFT_TOKENS


class Engine:
    """Generates text with a model.

    `generate` and `stream` run in the caller's thread. A server instead calls `submit` from any thread and
    `step` from one thread of its own; requests join the running batch as they come and leave it as they end.

    Args:
        model: from `luban.load_model`.
        max_batch: sequences that grow together; more wait. None: 256, with a contiguous cache 32.
        cache_bytes: memory for keys and values. None: half of what the device has free, on CUDA nearly all of it.
        cache_dtype: of keys and values; "auto": the model's; "fp8": about half the memory of bfloat16, at some loss.
        paged: whether keys and values are kept in blocks (`luban.serve.paged`). None: where the model allows it; False: a
            contiguous cache, which gives the same tokens more slowly.
        draft: a smaller model with the same vocabulary, which guesses tokens that the model then reads at once
            (`luban.serve.speculation`). Texts are the same as without.
        ngram: guess from what followed the same tokens before, in the place of `draft`.
        draft_tokens: guessed at once.
        swap_bytes: of host memory, where sequences that give their blocks up to others keep their keys and values; 0: their
            tokens are read again.
        batch_invariant: greedy and seeded outputs are bit for bit those of the request alone, whatever shares its batch and
            its prefix, at a price (docs/SERVING.md). The model's matmuls stay so after the engine is gone.
        adapters: name → run of adapters or PEFT directory, of which each request may ask for one. They share batches; the first
            `max_adapters` are read now, others when they are asked for.
        max_adapters: of them in memory at once.
        more_adapters: whether others come later and some go, by `adapters.add` and `adapters.remove` in the thread that steps.
        plan: whose axis `tensor` says among how many processes of this machine the model's weights, keys and values are divided.
            They are started here, and end with `close` or with this process.
        device: with a plan, of the first process; with CUDA the others have the devices behind it. None: the model's.

    Raises:
        UnsupportedError: a model that writes no text, or one that can't be paged where it must be.
        ConfigError, UsageError: a plan for which there are too few heads or GPUs.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_batch: int | None = None,
        cache_bytes: int | None = None,
        cache_dtype: str = "auto",
        paged: bool | None = None,
        draft: LoadedModel | None = None,
        ngram: bool = False,
        draft_tokens: int = DRAFT_TOKENS,
        swap_bytes: int = 0,
        batch_invariant: bool = False,
        adapters: Mapping[str, str | Path] | None = None,
        max_adapters: int = MOST,
        more_adapters: bool = False,
        plan: ParallelPlan | None = None,
        device: str | None = None,
    ):
        model = writer_of(model)
        self.adapters: AdapterPool | None = None
        if adapters or more_adapters:
            how = {"invariant": batch_invariant, "grows": more_adapters}
            self.adapters = AdapterPool(model, adapters or {}, max_adapters, **how)
        options = BatchOptions(
            max_batch=max_batch,
            cache_bytes=cache_bytes,
            cache_dtype=cache_dtype,
            paged=paged,
            draft=draft,
            ngram=ngram,
            draft_tokens=draft_tokens,
            swap_bytes=swap_bytes,
            batch_invariant=batch_invariant,
            plan=plan,
            device=device,
        )
        self.divided = options.divided  # whether `model.module` is this process's part alone
        self.model, self.batch = make_batch(model, options, self.adapters)
        model = self.model
        if model.generation.unbuilt:
            warn(
                f"{model.name}: its authors ask for {', '.join(model.generation.unbuilt)} (generation_config.json), which "
                "isn't built, so its text may differ from what they get"
            )
        self.intake = Intake(model, self.batch)
        self.arrived: deque[Request] = deque()  # submitted since the last step, from any thread
        self.waiting: list[Request] = []  # in the order of priority, then of arrival
        self.running: dict[int, Running] = {}  # by id of its growing sequence; some of them may still wait for blocks
        self._news: deque[News] = deque()
        # On a GPU requests are told of tokens while the next forward runs; elsewhere that would only make them wait.
        self.tells_later = next(model.module.parameters()).is_cuda
        self._stepping = threading.Lock()

    @property
    def budget(self) -> CacheBudget:
        """What the cache holds."""
        return self.batch.budget

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """See `luban.serve.intake.Intake.tokens_of`."""
        return self.intake.tokens_of(prompt)

    def request(self, prompt: Prompt, sampling: Sampling, listener: Callable[[Delta], None] | None = None) -> Request:
        """See `luban.serve.intake.Intake.request`."""
        return self.intake.request(prompt, sampling, listener)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None, adapters: str | Sequence[str] = ""
    ) -> list[Result]:
        """Continue every prompt; the results come in the order of the prompts. Without `sampling` tokens are chosen as
        the model's generation_config.json says, or as `Sampling()` does. Every prompt has draws of its own
        (`Sampling.for_prompt`). `adapters` names one for all prompts or one for each ("": none).

        Raises DataError for a prompt that is empty, malformed or too long, and for adapters that are not as many as prompts, before
        any is run, and NotFiniteError where the
        model's logits are NaN or infinite.
        """
        sampling = sampling or self.model.generation.sample({})
        several = cast(Sequence[Prompt], [prompts] if is_one(prompts) else prompts)
        names = [adapters] * len(several) if isinstance(adapters, str) else adapters
        if len(names) != len(several):
            raise DataError(
                f"{len(names)} adapters are named for {len(several)} prompts: one for each is needed, or one for all"
            )
        requests = [self.request(prompt, sampling.for_prompt(number)) for number, prompt in enumerate(several)]
        for request, name in zip(requests, names, strict=True):
            self.use_adapter(request, name)
        for request in requests:
            self.submit(request)
        while not all(request.done for request in requests):
            self.step()
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.result for request in requests]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, kept: frozenset[int] = frozenset()
    ) -> Iterator[Delta]:
        """Continue one prompt, a delta at a time, `sampling` as in `generate`, `kept` as in `Request`. Closing it stops."""
        arrived: deque[Delta] = deque()
        request = self.intake.request(prompt, sampling or self.model.generation.sample({}), arrived.append, kept=kept)
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

    def use_adapter(self, request: Request, name: str) -> None:
        """Let a request have the adapter of this name ("": none). Raises DataError for an unknown one."""
        if not name:
            return
        if self.adapters is None:
            raise DataError(f"there is no adapter '{name}': the engine was made without adapters")
        request.adapter = self.adapters.require(name)

    def submit(self, request: Request) -> None:
        """Queue a request; safe from any thread."""
        self.arrived.append(request)

    def weights_changed(self) -> None:
        """Say that the model's weights were changed in place, as training does between generations: keys and values that
        prompts share are computed anew. Nothing may be running."""
        self.batch.weights_changed()

    def close(self) -> None:
        """End the other processes of the model, if there are any. Nothing can be generated afterwards."""
        self.batch.close()

    def load(self) -> BatchLoad:
        """What runs and waits now; safe from any thread."""
        load = self.batch.load()
        return replace(load, waiting=load.waiting + len(self.arrived) + len(self.waiting))

    def step(self) -> bool:
        """One forward, and a token for every sequence that is ready for one. Returns whether there is more to do."""
        with self._stepping:
            self._drop_cancelled()
            self._admit()
            found = self.batch.next_tokens(self._tell)
            self.batch.go_on([growing for growing, tokens in found if self._took(growing, tokens)])
            self._drop_cancelled()  # the rest of requests that broke
            self._sweep_adapters()
            more = bool(self.running or self.waiting or self.arrived)
            if not (more and self.tells_later):
                self._tell()
            return more

    def _drop_cancelled(self) -> None:
        """Free at once what cancelled requests hold."""
        gone = [running for running in self.running.values() if running.request.cancelled]
        if gone:
            self.batch.leave([running.growing for running in gone])
        for growing, request, _ in gone:
            del self.running[id(growing)]
            self._cancel(request)

    def _admit(self) -> None:
        """Start waiting requests in their order, as far as the batch takes them; one larger than the batch runs alone."""
        while self.arrived:
            insort(self.waiting, self.arrived.popleft(), key=lambda request: request.priority)
        fresh: list[Request] = []
        while self.waiting:
            request = self.waiting[0]
            in_use = {other.adapter for other in (*fresh, *(running.request for running in self.running.values()))}
            fits = self.adapters is None or self.adapters.fits(request.adapter, in_use)
            if not request.cancelled and not (fits and self.batch.takes(request, fresh)):
                break
            self.waiting.pop(0)
            if request.cancelled:
                self._cancel(request)
            elif self._has_adapter(request, in_use):
                fresh.append(request)
        failed = dict(self.batch.start(fresh)) if fresh else {}
        for request in fresh:
            if error := failed.get(request):
                self._break(request, error)
                continue
            for growing in request.growing:
                self.running[id(growing)] = Running(growing, request, self._text(request))

    def _sweep_adapters(self) -> None:
        """Free what adapters hold that were removed, once no request has them."""
        if self.adapters is not None and self.adapters.sweepable:
            running = (running.request for running in self.running.values())
            self.adapters.sweep({request.adapter for request in (*self.arrived, *self.waiting, *running)})

    def _has_adapter(self, request: Request, in_use: set[str]) -> bool:
        """Read the request's adapter. Returns false where that failed, which ends the request."""
        if not request.adapter or self.adapters is None:
            return True
        try:
            request.identity = self.adapters.hold(request.adapter, in_use)
        except LubanError as error:
            self._break(request, error)
            return False
        return True

    def _took(self, growing: Growing, tokens: list[Token]) -> bool:
        """Hand out new tokens one by one; returns whether the continuation has ended."""
        return any(self._took_one(growing, token, last=at == len(tokens)) for at, token in enumerate(tokens, 1))

    def _took_one(self, growing: Growing, token: Token, *, last: bool) -> bool:
        """Hand out what `token` means for its request, the `last` known or not; returns whether the continuation has
        ended."""
        _, request, stream = self.running[id(growing)]
        sampling = growing.sampling
        choice = request.result.choices[growing.choice]
        if sampling.prompt_logprobs is not None and growing.choice == 0:
            request.result.prompt_logprobs = [None, *growing.prompt_logprobs]
        if isinstance(token, Answers) and not request.cancelled:
            del self.running[id(growing)]
            self._answer(request, token)
            return True
        if token is None or isinstance(token, Exception):
            self._break(request, token or NotFiniteError())
        if request.cancelled or not isinstance(token, int):
            del self.running[id(growing)]
            choice.finish_reason = "cancelled"
            return True
        choice.token_ids.append(token)
        ends = token in sampling.stop_token_ids or (token in self.model.stop_ids and not sampling.ignore_eos)
        reason: FinishReason | None = None
        if ends or (last and growing.matcher and growing.matcher.finished):
            reason = "stop"
        elif len(choice.token_ids) >= min(sampling.max_tokens, self.batch.max_new_tokens(growing.prompt)):
            reason = "length"
        news = News(growing, request, stream, token, ends, reason)
        if sampling.stop and stream is not None:  # its text says whether it has ended
            reason = self._tell_of(news)
        else:
            self._news.append(news)
        if reason:
            del self.running[id(growing)]
        return reason is not None

    def _tell(self) -> None:
        """Tell requests of their new tokens."""
        while self._news:
            self._tell_of(self._news.popleft())

    def _tell_of(self, news: News) -> FinishReason | None:
        """Make a token text, in the request's result and for its listener; returns why the continuation has ended."""
        growing, request, stream, token, ends, reason = news
        choice = request.result.choices[growing.choice]
        if request.error is not None or choice.finish_reason is not None:
            return choice.finish_reason
        text = "" if ends or stream is None else stream.push(token)
        if stream is not None and (reason or stream.stopped):
            text += stream.finish()
            reason = "stop" if stream.stopped else reason
        choice.text += text
        new = None
        if choice.logprobs is not None:
            new = [growing.logprobs[len(choice.logprobs)]]
            choice.logprobs += new
        choice.finish_reason = reason
        if request.listener:
            request.listener(
                Delta(choice=growing.choice, text=text, token_ids=[token], logprobs=new, finish_reason=reason)
            )
        return reason

    def _answer(self, request: Request, answers: Answers) -> None:
        """Hand out the best answers of a beam search."""
        for index, (hypothesis, score) in enumerate(answers.best[: request.sampling.n]):
            choice, ids = request.result.choices[index], list(hypothesis.tokens)
            choice.token_ids, choice.score, choice.finish_reason = ids, score, hypothesis.finish_reason
            if (stream := self._text(request)) is not None:
                shown = ids[:-1] if hypothesis.finish_reason == "stop" else ids
                choice.text = "".join([*map(stream.push, shown), stream.finish()])
            if request.listener:
                reason = choice.finish_reason
                request.listener(
                    Delta(choice=index, text=choice.text, token_ids=ids, logprobs=None, finish_reason=reason)
                )
        missing = request.result.choices[len(answers.best) :]
        if any(choice.finish_reason is None for choice in missing):  # a vocabulary or a structure with fewer texts
            self._break(
                request, StructureError(f"there are only {len(answers.best)} answers, n = {request.sampling.n}")
            )

    def _text(self, request: Request) -> TextStream | None:
        """For a continuation's text; None without a tokenizer."""
        if self.model.tokenizer is None:
            return None
        context = request.prompt if request.continues else ()
        return TextStream(self.model.tokenizer, request.sampling.stop, context, request.kept)

    def _cancel(self, request: Request) -> None:
        for choice in request.result.choices:
            choice.finish_reason = choice.finish_reason or "cancelled"

    def _break(self, request: Request, error: Exception) -> None:
        """End every continuation of one request with an error; what it holds is given back in the next step."""
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
            self._tell()
            broken = {
                id(r): r
                for r in [*self.arrived, *self.waiting, *(running.request for running in self.running.values())]
            }
            self.arrived.clear()
            self.waiting.clear()
            self.running.clear()
            self.batch.clear()
            for request in broken.values():
                self._break(request, error)

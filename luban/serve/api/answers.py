"""The two routes that generate: from a body to requests, from the engine's deltas to a response or a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from luban.core.errors import DataError
from luban.core.protocols import Answered, Answerer, Grounded
from luban.generate.cache import PromptTooLong
from luban.generate.sampling import Sampling
from luban.generate.structure import Structure
from luban.generate.token_mask import StructureError
from luban.serve.api.answer import Logprobs, Shape, usage
from luban.serve.api.answered import answered_delta, answered_request, question_of
from luban.serve.api.bodies import MAX_SEQUENCES, Body
from luban.serve.api.chat_body import ChatBody
from luban.serve.api.completion_body import COMPLETION_TOKENS, CompletionBody
from luban.serve.api.errors import Stopping, error_body
from luban.serve.api.metrics import Timing
from luban.serve.api.tool_formats import ToolFormat, ToolParser, format_of
from luban.serve.history import History
from luban.serve.intake import COUNTED
from luban.serve.request import Delta, Prompt, Request
from luban.serve.worker import GenerationError
from luban.tokenizer.chat import render

if TYPE_CHECKING:
    from luban.serve.api.service import Service

ANSWER_TOKENS = 256  # of the context that are kept for an answer without max_tokens, where messages are left out
LEFT_OUT = "luban-messages-left-out"  # header: how many messages of the conversation the model didn't read
Deltas = AsyncGenerator[tuple[int, Delta], None]  # each with the index of its request
LEAST_ANSWER = 64  # tokens of the context that passages leave for an answer, or max_tokens if that is less


@dataclass
class Job:
    """The answers to one HTTP request."""

    body: Body
    sampling: Sampling
    shape: Shape
    requests: list[Request] = field(default_factory=list)
    echoed: list[str] | None = None  # the prompts' texts, where they are to be repeated
    prompt_alone: bool = False  # whether nothing is to be generated
    grounded: Grounded | Answered | None = None  # knows the passages that answers cite, where an index is served
    tools: ToolFormat | None = None  # how calls of tools are written; None: there are none
    left_out: int = 0  # messages of the conversation that the model doesn't read
    _parsers: dict[int, ToolParser] = field(default_factory=dict)  # by choice
    _begun: set[int] = field(default_factory=set)  # choices whose prompt has been repeated

    def choice(self, index: int, delta: Delta, *, chunk: bool) -> dict[str, Any]:
        """What a delta of request `index`, or a whole answer in that form, adds to its choice."""
        request, number = self.requests[index], index * self.sampling.n + delta.choice
        text, calls, first, reason = delta.text, [], 0, delta.finish_reason
        if self.tools is not None:
            parser = self._parsers.setdefault(number, ToolParser(self.tools))
            first = len(parser.calls)
            text, calls = parser.push(text)
            if reason:
                rest, more = parser.finish()
                text, calls = text + rest, calls + more
                reason = "tool_calls" if parser.calls and reason == "stop" else reason
        logprobs: Logprobs | None = delta.logprobs
        if self.prompt_alone:
            text, reason = "", "length"
            logprobs = None if logprobs is None else []
        if self.echoed is not None and number not in self._begun:
            self._begun.add(number)
            text = self.echoed[index] + text
            if logprobs is not None:
                entries = (request.result.prompt_logprobs or [])[1:]
                logprobs = [request.prompt[0], *(entry for entry in entries if entry), *logprobs]
        found = self.shape.choice(number, text, logprobs, reason, chunk=chunk, calls=calls, first_call=first)
        if self.body.prompt_logprobs is not None and not chunk and request.result.prompt_logprobs:
            found["prompt_logprobs"] = self.shape.prompt_logprobs(request.result.prompt_logprobs)
        return found

    def whole(self) -> list[dict[str, Any]]:
        """All choices, once all requests are done."""
        return [
            self.choice(
                index,
                Delta(
                    choice=number,
                    text=choice.text,
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs,
                    finish_reason=choice.finish_reason,
                ),
                chunk=False,
            )
            for index, request in enumerate(self.requests)
            for number, choice in enumerate(request.result.choices)
        ]

    def citations(self) -> dict[str, Any]:
        """`citations` beside OpenAI's fields where an index is served: the passages that the answers cite, each once."""
        if self.grounded is None:
            return {}
        texts = [choice.text for request in self.requests for choice in request.result.choices]
        found = {row["mark"]: row for text in texts for row in self.grounded.citations(text)}
        return {"citations": list(found.values())}

    def usage(self) -> dict[str, Any]:
        """Token counts."""
        counted = usage(self.requests)
        if self.prompt_alone:
            counted |= {"completion_tokens": 0, "total_tokens": counted["prompt_tokens"]}
        return counted


class Answers:
    """POST /v1/completions and /v1/chat/completions."""

    def __init__(self, service: Service):
        self.service = service

    async def completions(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Continue one or several prompts."""
        self.service.require(body.model)
        prompts, alone = body.prompts(), body.prompt_alone
        if alone:
            body.max_tokens = 1
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            body.prompt_logprobs = body.logprobs
        sampling = body.sampling(self.service.model.generation, COMPLETION_TOKENS, body.logprobs)
        job = Job(body, sampling, self._shape(body, chat=False), prompt_alone=alone)
        if body.echo:
            tokenizer = self.service.model.need_tokenizer()
            job.echoed = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts]
        return await self._answer(job, list(prompts), http)

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation."""
        service, engine = self.service, self.service.writer()
        service.require(body.model)
        body.refuse_unsupported()
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        messages = [message.plain() for message in body.messages]
        if service.answerer is not None:
            return await self._by_answerer(service.answerer, body, messages, http)
        form, structure = self._tools(body)
        grounded = None
        if service.retriever is not None and messages[-1]["role"] == "user":
            grounded = await service.tokenised(service.retriever.ground, messages, partial(self._fits, body=body))
            messages, structure = grounded.messages, self._quoting(grounded, body, structure)
        prompt, left_out = await service.tokenised(self._rendered, messages, body)
        longest = engine.budget.longest_answer(prompt, body.n)
        sampling = body.sampling(service.model.generation, longest, body.alternatives, structure)
        if grounded is not None and grounded.grammar is not None:  # of which no words at all are a text, too
            sampling = replace(sampling, min_tokens=max(sampling.min_tokens, 1))
        job = Job(body, sampling, self._shape(body, chat=True), tools=form, grounded=grounded, left_out=left_out)
        return await self._answer(job, [prompt], http)

    async def _by_answerer(
        self, answerer: Answerer, body: ChatBody, messages: list[dict[str, Any]], http: HttpRequest
    ) -> Response:
        """What an answerer writes to the last message, between the engine's steps."""
        service, question = self.service, question_of(body, messages)
        service.require_open(1)
        assert service.worker is not None  # else the request had been answered 503
        service.active += 1
        try:
            found = await service.worker.between_steps(partial(answerer.answer, question, body.max_tokens))
        finally:
            service.active -= 1
        sampling = Sampling(max_tokens=max(len(found.token_ids), 1))
        job = Job(body, sampling, self._shape(body, chat=True), grounded=found, left_out=len(messages) - 1)
        job.requests, delta = [answered_request(found, sampling)], answered_delta(found)
        return await self._respond(job, http, lambda: self._told(job, _only((0, delta)), http))

    def _shape(self, body: CompletionBody | ChatBody, *, chat: bool) -> Shape:
        model = self.service.model
        return Shape(chat=chat, model=body.model or model.name, tokenizer=model.need_tokenizer())

    def _tools(self, body: ChatBody) -> tuple[ToolFormat | None, Structure | None]:
        """How calls are written, where tools are offered, and the texts that are calls, where one is required."""
        required = body.required()
        if not body.offered():
            return None, None
        if body.structure() is not None:
            raise DataError("'tools' together with 'response_format' or 'structured_outputs' are not supported")
        form = format_of(self.service.model.need_tokenizer())
        functions = [(tool.function.name, tool.function.parameters) for tool in required or body.offered()]
        if not required:
            strict = any(tool.function.strict for tool in body.offered())
            return form, form.text_or_calls(functions) if strict else None
        return form, form.structure(functions, several=body.tool_choice == "required" and body.parallel_tool_calls)

    def _quoting(self, grounded: Grounded, body: ChatBody, structure: Structure | None) -> Structure | None:
        """What the answer is held to, where that is words of the passages. Raises DataError for a request of another form."""
        if grounded.grammar is None:
            return structure
        if body.offered() or body.structure() is not None:
            raise DataError(
                "this server's answers quote the passages of its index: leave out 'tools', 'response_format' and "
                "'structured_outputs', or have it started without --quote"
            )
        return Structure.grammar(grounded.grammar)

    def _fits(self, messages: list[dict[str, Any]], body: ChatBody) -> bool:
        """Whether a conversation fits the context together with an answer, without a message left out."""
        answer = min(body.max_tokens or LEAST_ANSWER, LEAST_ANSWER)
        try:
            found, left_out = self._rendered(messages, body, counted=0)
        except PromptTooLong:
            return False
        return not left_out and len(found) + answer <= self.service.model.spec.context

    def _rendered(
        self, messages: list[dict[str, Any]], body: ChatBody, counted: int = COUNTED
    ) -> tuple[list[int], int]:
        """A conversation's tokens up to where the answer begins, and how many of its messages were left out; `counted` as in
        `luban.serve.intake.Intake.require_room`. Raises DataError for a name that the template ignores."""
        tokenizer, engine = self.service.model.need_tokenizer(), self.service.writer()
        tools = [tool.model_dump(exclude_none=True) for tool in body.offered()]

        def tokens(messages: Sequence[Mapping[str, Any]], counted: int = counted) -> list[int]:
            engine.intake.require_room("\n".join(str(message["content"] or "") for message in messages), counted)
            variables = body.chat_template_kwargs
            rendered = render(messages, tokenizer, add_generation_prompt=True, tools=tools, variables=variables)
            return rendered.token_ids

        rule = self.service.history
        quick = partial(tokens, counted=0)  # asked many times, for yes or no
        fitted = History(engine, rule, answer_tokens=body.max_tokens or ANSWER_TOKENS, tokens=quick).fit(messages)
        messages, left_out = fitted.messages, len(fitted.dropped)
        found = tokens(messages)
        if any(m.get("name") and m["role"] != "tool" for m in messages):
            nameless = [{k: v for k, v in m.items() if k != "name"} if m["role"] != "tool" else m for m in messages]
            if tokens(nameless) == found:
                raise DataError("'name' in a message is not supported: the model's chat template has no place for it")
        return found, left_out

    async def _answer(self, job: Job, prompts: list[Any], http: HttpRequest) -> Response:
        service, n = self.service, job.sampling.n
        if len(prompts) * n > MAX_SEQUENCES:
            raise DataError(f"{len(prompts)} prompts × n = {n} are more than {MAX_SEQUENCES} answers")
        job.requests = await service.tokenised(self._requests, job, prompts)
        service.require_open(len(prompts) * n)
        return await self._respond(job, http, lambda: self._deltas(job, http))

    async def _respond(self, job: Job, http: HttpRequest, deltas: Callable[[], Deltas]) -> Response:
        """The response or the stream of a job whose deltas come so."""
        headers = {LEFT_OUT: str(job.left_out)} if job.left_out else {}
        if job.body.stream:
            events = self._events(job, deltas())
            headers = {"Cache-Control": "no-store", **headers}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        if not await self._finish(deltas(), http):
            return Response(status_code=499)  # the client has gone
        body = {**job.shape.body(job.whole(), chunk=False, usage=job.usage()), **job.citations()}
        return JSONResponse(body, headers=headers)

    def _requests(self, job: Job, prompts: list[Prompt]) -> list[Request]:
        intake, kept = self.service.writer().intake, job.tools.kept() if job.tools else frozenset()
        requests = [
            intake.request(prompt, job.sampling.for_prompt(number), priority=job.body.priority, kept=kept)
            for number, prompt in enumerate(prompts)
        ]
        if job.body.model in self.service.adapters():
            for request in requests:
                self.service.writer().use_adapter(request, job.body.model)
        return requests

    async def _finish(self, deltas: Deltas, http: HttpRequest) -> bool:
        """Run to the end; false when the client left before it."""

        async def drain() -> None:
            async for _ in deltas:
                pass

        task = asyncio.create_task(drain())
        try:
            while not (await asyncio.wait({task}, timeout=0.25))[0]:
                if await http.is_disconnected():
                    return False
            task.result()
            return True
        finally:
            task.cancel()
            await asyncio.wait({task})  # until it has been counted and noted for the log

    async def _events(self, job: Job, deltas: Deltas) -> AsyncIterator[str]:
        """Server-sent events: chunks, then usage where asked for, then [DONE]."""
        shape = job.shape
        if shape.chat:
            yield _event(shape.body([shape.opening(i) for i in range(job.sampling.n)], chunk=True))
        left = len(job.requests) * job.sampling.n  # answers that have not ended
        try:
            async for index, delta in deltas:
                choice = job.choice(index, delta, chunk=True)
                if choice.get("text") or choice.get("delta") or choice["finish_reason"] or delta.logprobs:
                    left -= choice["finish_reason"] is not None
                    cited = job.citations() if not left else {}  # with the chunk that ends the last answer
                    yield _event({**shape.body([choice], chunk=True), **cited})
        except (GenerationError, Stopping) as error:
            yield _event(error_body(str(error), kind="server_error"))
            return
        except StructureError as error:
            yield _event(error_body(str(error)))
            return
        finally:
            await deltas.aclose()
        if job.body.wants_usage:
            yield _event(shape.body([], chunk=True, usage=job.usage()))
        yield "data: [DONE]\n\n"

    def _deltas(self, job: Job, http: HttpRequest) -> Deltas:
        """The engine's deltas of all requests up to where the server is stopped (Stopping is raised then)."""
        worker = self.service.worker
        assert worker is not None  # else the request had been answered 503
        return self._told(job, self._until_stopped(worker.run(job.requests)), http)

    async def _told(self, job: Job, deltas: Deltas, http: HttpRequest) -> Deltas:
        """Deltas as they come, counted and logged."""
        service, timing = self.service, Timing(self.service.metrics, job.requests)
        service.active += 1
        try:
            async for index, delta in deltas:
                timing.delta(index, delta)
                yield index, delta
        finally:
            service.active -= 1
            await deltas.aclose()
            timing.close()
            self._note(job, timing, http.state.note)

    def _note(self, job: Job, timing: Timing, note: dict[str, Any]) -> None:
        """What the log says of a request."""
        results = [request.result for request in job.requests]
        note |= job.usage()
        note |= note.pop("prompt_tokens_details")
        note["first_token_seconds"] = None if timing.first is None else round(timing.first, 4)
        note["finish"] = [choice.finish_reason or "cancelled" for result in results for choice in result.choices]
        if self.service.log_text:
            tokenizer = self.service.model.need_tokenizer()
            note["prompts"] = [tokenizer.decode(result.prompt_token_ids, skip_special=False) for result in results]
            note["answers"] = [choice.text for result in results for choice in result.choices]

    async def _until_stopped(self, deltas: Deltas) -> Deltas:
        """The same, up to where the server is stopped. Raises Stopping then."""
        stopped = asyncio.ensure_future(self.service.stopping.wait())
        coming = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(deltas))
                await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    raise Stopping("the server is being stopped")
                try:
                    delta = coming.result()
                except StopAsyncIteration:
                    return
                yield delta
        finally:
            stopped.cancel()
            if coming is not None and not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError):
                    await coming
            await deltas.aclose()


async def _only(delta: tuple[int, Delta]) -> Deltas:
    yield delta


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"

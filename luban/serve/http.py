"""The HTTP API, compatible with OpenAI's, and the chat page.

Every route needs the key where one is set, except `/health` and the page's own three files, which hold
nothing but themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from luban.core.errors import DataError, LubanError
from luban.generate.sampling import Sampling
from luban.serve.answer import Shape, usage
from luban.serve.api import COMPLETION_TOKENS, MAX_SEQUENCES, Body, ChatBody, CompletionBody, error_body
from luban.serve.body_limit import BodyLimit, body_limit
from luban.serve.engine import Delta, Engine, Prompt, Request
from luban.serve.guard import KeyGuard, SiteGuard
from luban.serve.worker import GenerationError, Worker
from luban.tokenizer.chat import render

PAGE = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
}
OPEN = {"/health", *PAGE}  # what answers without the key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'"
)


TOKENISING = 2  # threads
Result = TypeVar("Result")
TRIED = re.compile(r"(str|int|float|bool|list\[.*|dict\[.*)$")  # types in the places of validation errors


class UnknownModel(LubanError):
    """A model that isn't served here."""


class Stopping(LubanError):
    """The server is being stopped."""


def create_app(
    engine: Engine, *, api_key: str | None = None, hosts: Iterable[str] = (), origins: Iterable[str] = ()
) -> FastAPI:
    """The application around one engine, which it runs in a thread of its own from start-up to shut-down.

    Args:
        api_key: clients must send it.
        hosts: names of the server besides addresses, localhost and the machine's own.
        origins: sites whose pages may use the server.

    `app.state.service.stop()` ends what is running; safe from any thread and from signal handlers.
    """
    worker = Worker(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        worker.start()
        service.loop = asyncio.get_running_loop()
        yield
        await run_in_threadpool(worker.stop)

    app = FastAPI(title="Luban", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    if api_key:
        app.add_middleware(KeyGuard, key=api_key, free=frozenset(OPEN))
    app.add_middleware(SiteGuard, hosts=frozenset(hosts), origins=frozenset(origins))
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(BodyLimit, limit=body_limit(engine.model.spec.context))
    _add_errors(app)
    _add_page(app)
    service = app.state.service = Service(worker)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.one_model)
    app.post("/v1/completions", response_model=None)(service.completions)
    app.post("/v1/chat/completions", response_model=None)(service.chat)
    return app


class Service:
    """The routes."""

    def __init__(self, worker: Worker):
        self.worker, self.engine, self.model = worker, worker.engine, worker.engine.model
        self.name = self.model.name
        self.loop: asyncio.AbstractEventLoop | None = None  # while the application runs
        self.stopping = asyncio.Event()
        self.tokenising = CapacityLimiter(TOKENISING)

    def stop(self) -> None:
        """End what is running, each with an error, and refuse what comes."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.stopping.set)

    async def health(self) -> JSONResponse:
        """Whether the engine runs."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._model()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The same by name."""
        self._require(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        chat = self.model.tokenizer is not None and self.model.tokenizer.chat_template is not None
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "luban",
            "context": self.model.spec.context,
            "chat": chat,
        }

    def _require(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise UnknownModel(f"the model '{name}' is not served here: '{self.name}' is")

    async def completions(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Continue one or several prompts."""
        self._require(body.model)
        sampling = body.sampling(self.model.generation, COMPLETION_TOKENS, body.logprobs)
        return await self._answer(body, body.prompts(), sampling, http, chat=False)

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation."""
        self._require(body.model)
        body.refuse_unsupported()
        body.max_tokens = body.max_completion_tokens or body.max_tokens
        messages = [message.plain() for message in body.messages]
        prompt = await self._tokenised(self._rendered, messages, body.chat_template_kwargs)
        longest = self.engine.budget.longest_answer(prompt, body.n)
        sampling = body.sampling(self.model.generation, longest, body.alternatives)
        return await self._answer(body, [prompt], sampling, http, chat=True)

    def _rendered(self, messages: list[dict[str, Any]], variables: dict[str, Any] | None) -> list[int]:
        """A conversation's tokens up to where the answer begins. Raises DataError for a name that the template ignores."""
        tokenizer = self.model.need_tokenizer()
        self.engine.require_room("\n".join(str(message["content"] or "") for message in messages))

        def tokens(messages: list[dict[str, Any]]) -> list[int]:
            return render(messages, tokenizer, add_generation_prompt=True, variables=variables).token_ids

        found = tokens(messages)
        if any(m.get("name") and m["role"] != "tool" for m in messages):
            nameless = [{k: v for k, v in m.items() if k != "name"} if m["role"] != "tool" else m for m in messages]
            if tokens(nameless) == found:
                raise DataError("'name' in a message is not supported: the model's chat template has no place for it")
        return found

    async def _answer(
        self, body: Body, prompts: list[Any], sampling: Sampling, http: HttpRequest, *, chat: bool
    ) -> Response:
        if len(prompts) * sampling.n > MAX_SEQUENCES:
            raise DataError(f"{len(prompts)} prompts × n = {sampling.n} are more than {MAX_SEQUENCES} answers")
        requests = await self._tokenised(self._requests, prompts, sampling)
        shape = Shape(chat=chat, model=self.name, tokenizer=self.model.need_tokenizer())
        if body.stream:
            events = self._events(requests, shape, body.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        if not await self._finish(requests, http):
            return Response(status_code=499)  # the client has gone
        choices = [
            shape.choice(index * sampling.n + i, choice.text, choice.logprobs, choice.finish_reason, chunk=False)
            for index, request in enumerate(requests)
            for i, choice in enumerate(request.result.choices)
        ]
        return JSONResponse(shape.body(choices, chunk=False, usage=usage(requests)))

    async def _tokenised(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what tokenises in a thread, a few at a time, so that the event loop and the model's thread go on."""
        return await to_thread.run_sync(function, *arguments, limiter=self.tokenising)

    def _requests(self, prompts: list[Prompt], sampling: Sampling) -> list[Request]:
        return [self.engine.request(prompt, sampling) for prompt in prompts]

    async def _finish(self, requests: list[Request], http: HttpRequest) -> bool:
        """Run to the end; false when the client left before it."""

        async def drain() -> None:
            async for _ in self._until_stopped(self.worker.run(requests)):
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

    async def _events(self, requests: list[Request], shape: Shape, wants_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: chunks, then usage where asked for, then [DONE]."""
        n = requests[0].sampling.n
        if shape.chat:
            yield _event(shape.body([shape.opening(i) for i in range(n)], chunk=True))
        deltas = self._until_stopped(self.worker.run(requests))
        try:
            async for index, delta in deltas:
                if delta.text or delta.finish_reason or delta.logprobs:
                    choice = shape.choice(
                        index * n + delta.choice, delta.text, delta.logprobs, delta.finish_reason, chunk=True
                    )
                    yield _event(shape.body([choice], chunk=True))
        except (GenerationError, Stopping) as error:
            yield _event(error_body(str(error), kind="server_error"))
            return
        finally:
            await deltas.aclose()
        if wants_usage:
            yield _event(shape.body([], chunk=True, usage=usage(requests)))
        yield "data: [DONE]\n\n"

    async def _until_stopped(
        self, deltas: AsyncGenerator[tuple[int, Delta], None]
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """The same, up to where the server is stopped. Raises Stopping then."""
        stopped = asyncio.ensure_future(self.stopping.wait())
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


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


def _field(place: Sequence[str | int]) -> str:
    """The field that a validation error is about: its place in the body, without the names of the types that were tried."""
    named = itertools.takewhile(lambda part: not (isinstance(part, str) and TRIED.match(part)), place[1:])
    return ".".join(map(str, named))


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            where = f"{first.get('ctx', {}).get('error', 'not understood')} at character {first['loc'][-1]}"
            return JSONResponse(error_body(f"the request's body is not valid JSON: {where}"), 400)
        where = _field(first["loc"])
        said = dict.fromkeys(
            str(each["msg"]).removeprefix("Value error, ") for each in error.errors() if _field(each["loc"]) == where
        )
        message = ", or ".join(said)  # one for each form that a field may have
        return JSONResponse(error_body(f"{where}: {message}" if where else message, param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        message = f"no route {http.method} {http.url.path}" if error.status_code in (404, 405) else str(error.detail)
        return JSONResponse(error_body(message), error.status_code, error.headers)

    @app.exception_handler(UnknownModel)
    async def unknown(_: HttpRequest, error: UnknownModel) -> JSONResponse:
        return JSONResponse(error_body(str(error), param="model", code="model_not_found"), 404)

    @app.exception_handler(Stopping)
    async def stopping(_: HttpRequest, error: Stopping) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind="server_error"), 503)

    @app.exception_handler(GenerationError)
    async def failed(_: HttpRequest, error: GenerationError) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind="server_error"), 500)

    @app.exception_handler(Exception)
    async def broken(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"the server failed: {type(error).__name__}", kind="server_error"), 500)

    @app.exception_handler(LubanError)
    async def wrong(_: HttpRequest, error: LubanError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), 400)


def _add_page(app: FastAPI) -> None:
    """The chat page's files, read once."""
    folder = files("luban.serve") / "page"
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(
                content,
                media_type=kind,
                headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
            )

        app.get(path, include_in_schema=False)(page)

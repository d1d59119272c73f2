"""The application: routes, what stands before them, and its life from loading the model to the last answer.

Every route needs the key where one is set, except `/health` and the page's own three files, which hold nothing but
themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from luban.core.errors import UnsupportedError
from luban.core.log import say
from luban.core.protocols import Answerer, Grounder
from luban.load.model import LoadedModel
from luban.serve.api.adapter_routes import AdapterRoutes
from luban.serve.api.answers import LEFT_OUT
from luban.serve.api.body_limit import BodyLimit, body_limit
from luban.serve.api.chat_page import PAGE, add_page
from luban.serve.api.errors import add_error_handlers
from luban.serve.api.guard import KeyGuard, SiteGuard
from luban.serve.api.rate_limit import RateLimit
from luban.serve.api.readiness import OpenWhenReady
from luban.serve.api.request_log import RequestLog
from luban.serve.api.service import Service
from luban.serve.engine import Engine
from luban.serve.history import Rule

OPEN = {"/health", *PAGE}  # what answers without the key
MAX_QUEUE = 1024  # sequences


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How an application behaves, whatever it serves."""

    api_key: str | None = None  # clients must send it
    hosts: tuple[str, ...] = ()  # names of the server besides addresses, localhost and the machine's own
    origins: tuple[str, ...] = ()  # sites whose pages may use the server
    max_queue: int = MAX_QUEUE  # sequences that may wait; more are answered 429
    requests_per_minute: int | None = None  # of one client; more are answered 429; none: as many as come
    log_requests: bool = False  # write a line of JSON to standard error for every request
    log_text: bool = False  # … with the text of prompts and answers
    history: Rule = "error"  # what becomes of conversations longer than the context (`luban.serve.history`)
    more_adapters: bool = (
        False  # take adapters while it runs (`luban.serve.api.adapter_routes`); the engine must take them, too
    )
    retriever: Grounder | None = None  # finds passages for chats, whose answers then have citations
    answerer: Answerer | None = None  # answers chats' questions in its own way, in the place of the engine


def engine_or_model(model: LoadedModel, engine: Callable[[LoadedModel], Engine] = Engine) -> Engine | LoadedModel:
    """An engine; the model itself where it writes no text and can be used for embeddings.

    Raises what `engine` raises of other models.
    """
    model.need_tokenizer()
    try:
        return engine(model)
    except UnsupportedError as error:
        if model.spec.body.causal or model.spec.body.two_sided or not model.spec.body.stacked:
            raise
        say(f"only embeddings are served: {error}")
        return model


def create_app(
    served: Engine | LoadedModel | Callable[[], Engine | LoadedModel],
    options: ServerOptions | None = None,
    *,
    api_key: str | None = None,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
) -> FastAPI:
    """The application around one model, which it runs in a thread of its own from start-up to shut-down.

    Args:
        served: an engine; a model, which gets one, or of which only embeddings are served where it writes no text; or a
            function that gives an engine or such a model, which is called at start-up in a thread: until it returns, requests
            are answered 503. What it raises is kept as `app.state.service.broken`.
        options: how it behaves.
        api_key, hosts, origins: in the place of the options'.

    `app.state.service.stop()` ends what is running; safe from any thread and from signal handlers.
    """
    options = options or ServerOptions(api_key=api_key, hosts=tuple(hosts), origins=tuple(origins))
    service = Service(
        max_queue=options.max_queue,
        log_text=options.log_text,
        history=options.history,
        retriever=options.retriever,
        answerer=options.answerer,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        service.loop = asyncio.get_running_loop()
        loading = asyncio.create_task(service.load(served)) if callable(served) else None
        if loading is None:
            service.start()
        yield
        if loading is not None:
            loading.cancel()
        await run_in_threadpool(service.close)

    if not callable(served):
        service.serve(engine_or_model(served) if isinstance(served, LoadedModel) else served)
    app = FastAPI(title="Luban", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(BodyLimit, limit=lambda: body_limit(service.context))
    app.add_middleware(OpenWhenReady, service=service, free=frozenset(OPEN))
    if options.requests_per_minute:
        app.add_middleware(RateLimit, per_minute=options.requests_per_minute)
    if options.api_key:
        app.add_middleware(KeyGuard, key=options.api_key, free=frozenset(OPEN))
    app.add_middleware(SiteGuard, hosts=frozenset(options.hosts), origins=frozenset(options.origins))
    if options.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[LEFT_OUT],
        )
    app.add_middleware(RequestLog, write=say if options.log_requests else None)
    add_error_handlers(app)
    add_page(app)
    service.add_routes(app)
    if options.more_adapters:
        AdapterRoutes(service).add_to(app)
    return app

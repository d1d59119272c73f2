"""What the application serves, from loading to the last answer, and the routes that don't generate."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, field_validator
from starlette.concurrency import run_in_threadpool

from luban.core.errors import DataError, LubanError, UnsupportedError
from luban.core.protocols import Answerer, Grounder
from luban.load.model import LoadedModel
from luban.serve.api.answers import Answers
from luban.serve.api.bodies import MAX_SEQUENCES
from luban.serve.api.errors import RETRY_AFTER, Busy, Stopping, UnknownModel
from luban.serve.api.metrics import Metrics
from luban.serve.api.token_routes import DetokenizeBody, TokenizeBody
from luban.serve.batch import BatchLoad
from luban.serve.embedder import Embedder
from luban.serve.engine import Engine
from luban.serve.history import Rule
from luban.serve.request import Request
from luban.serve.worker import Worker

TOKENISING = 2  # threads
Result = TypeVar("Result")


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Any  # a text or token ids, or a list of either
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    priority: int = 0

    @field_validator("input")
    @classmethod
    def known_form(cls, given: Any) -> Any:
        """As prompts of completions."""
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(several) > MAX_SEQUENCES:
            raise ValueError(f"at most {MAX_SEQUENCES} texts")
        if not all(isinstance(one, str) or (isinstance(one, list) and set(map(type, one)) <= {int}) for one in several):
            raise ValueError("should be a string, a list of token ids, or a list of either")
        return several


class NoEngine:
    """In the place of an engine where only embeddings are served."""

    def submit(self, request: Request) -> None:
        """Never called."""
        raise UnsupportedError("this model writes no text")

    def step(self) -> bool:
        """Nothing to do."""
        return False

    def fail(self, error: Exception) -> None:
        """Nothing to give up."""


class Service:
    """The model that is served, and its state.

    Args:
        max_queue: sequences that may wait.
        log_text: whether the log of requests holds texts.
        history: what becomes of conversations longer than the context.
        retriever: puts passages before the last question of chats; None: chats are answered as they are.
        answerer: answers the last question of chats in the place of the engine.
    """

    def __init__(
        self,
        *,
        max_queue: int,
        log_text: bool = False,
        history: Rule = "error",
        retriever: Grounder | None = None,
        answerer: Answerer | None = None,
    ):
        self.max_queue, self.log_text, self.retriever, self.answerer = max_queue, log_text, retriever, answerer
        self.history: Rule = history
        self.engine: Engine | None = None
        self.worker: Worker | None = None  # None: the model is still being loaded
        self.broken: Exception | None = None  # what made loading fail
        self.loop: asyncio.AbstractEventLoop | None = None  # while the application runs
        self.stopping = asyncio.Event()
        self.draining = False
        self.loaded_at = 0  # Unix time at which the model was there
        self.active = 0  # answers that are being written
        self.on_loaded: Callable[[], None] = lambda: None  # called when loading has ended, well or not
        self.tokenising = CapacityLimiter(TOKENISING)
        self.metrics = Metrics(self.engine_load)

    # Life -------------------------------------------------------------------------------------------------

    def serve(self, served: Engine | LoadedModel) -> None:
        """Take up what has been loaded."""
        self.engine = served if isinstance(served, Engine) else None
        self._model = served.model if isinstance(served, Engine) else served
        self.loaded_at = int(time.time())
        self.worker = Worker(served if isinstance(served, Engine) else NoEngine())

    async def load(self, function: Callable[[], Engine | LoadedModel]) -> None:
        """Load in a thread; what it raises is kept in `broken`."""
        try:
            self.serve(await run_in_threadpool(function))
            self.start()
        except Exception as error:
            self.broken = error
        self.on_loaded()

    def start(self) -> None:
        """Start the model's thread."""
        assert self.worker is not None
        self.worker.start()

    def close(self) -> None:
        """Stop the model's thread."""
        if self.worker is not None:
            self.worker.stop()

    def stop(self) -> None:
        """End what is running, each with an error, and refuse what comes; from any thread and from signal handlers."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.stopping.set)

    async def drain(self, seconds: float) -> None:
        """Refuse what comes and let what runs end; what hasn't after so many seconds is ended with an error."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self.active and asyncio.get_running_loop().time() < deadline and not self.stopping.is_set():
            await asyncio.sleep(0.05)
        self.stopping.set()

    @property
    def ready(self) -> bool:
        """Whether the model has been loaded."""
        return self.worker is not None

    @property
    def model(self) -> LoadedModel:
        """The model that is served, once it is loaded."""
        return self._model

    @property
    def context(self) -> int:
        """Tokens of the longest sequence; 0 while the model is loaded."""
        return self.model.spec.context if self.ready else 0

    def engine_load(self) -> BatchLoad | None:
        """What the engine holds; None where there is none."""
        return None if self.engine is None else self.engine.load()

    # What routes ask ----------------------------------------------------------------------------------------

    def require(self, name: str | None) -> None:
        """Raise UnknownModel unless the name is that of the model served, of one of its adapters, or none."""
        if name not in (None, self.model.name, *self.adapters()):
            served = " and ".join(f"'{each}'" for each in (self.model.name, *self.adapters()))
            raise UnknownModel(f"the model '{name}' is not served here: {served} {'are' if self.adapters() else 'is'}")

    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for."""
        pool = None if self.engine is None else self.engine.adapters
        return () if pool is None else pool.names

    def require_open(self, sequences: int) -> None:
        """Raise Stopping while the server drains, Busy where so many more sequences would make the queue too long."""
        if self.draining or self.stopping.is_set():
            raise Stopping("the server is being stopped")
        load = self.engine_load()
        waiting = (load.waiting if load is not None else 0) + (self.worker.calls_waiting if self.worker else 0)
        if waiting and waiting + sequences > self.max_queue:
            self.metrics.refused.inc()
            raise Busy(f"{waiting} sequences wait already, and {self.max_queue} may: try again later")

    def writer(self) -> Engine:
        """The engine. Raises UnsupportedError where the model writes no text."""
        if self.engine is None:
            raise UnsupportedError(f"the model '{self.model.name}' writes no text: only embeddings of it are served")
        return self.engine

    async def tokenised(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what tokenises in a thread, a few at a time, so that the event loop and the model's thread go on."""
        return await to_thread.run_sync(function, *arguments, limiter=self.tokenising)

    # Routes -------------------------------------------------------------------------------------------------

    def add_routes(self, app: FastAPI) -> None:
        """All routes but the page's."""
        answers = Answers(self)
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics_page)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.one_model)
        app.post("/v1/completions", response_model=None)(answers.completions)
        app.post("/v1/chat/completions", response_model=None)(answers.chat)
        app.post("/v1/embeddings")(self.embeddings)
        app.post("/tokenize")(self.tokenize)
        app.post("/detokenize")(self.detokenize)

    async def health(self) -> JSONResponse:
        """200 while requests are taken, else 503 with why not."""
        if self.worker is None:
            state = "loading"
        elif not self.worker.alive:
            state = "stopped"
        else:
            state = "draining" if self.draining else "ok"
        if state == "ok":
            return JSONResponse({"status": state})
        return JSONResponse({"status": state}, 503, RETRY_AFTER)

    async def metrics_page(self) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The model that is served, and its adapters."""
        names = (self.model.name, *self.adapters())
        return {"object": "list", "data": [self._described(name) for name in names]}

    async def one_model(self, name: str) -> dict[str, Any]:
        """The same by name."""
        self.require(name)
        return self._described(name)

    def _described(self, name: str) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        chat = self.answerer is not None or (tokenizer is not None and tokenizer.chat_template is not None)
        return {
            "id": name,
            "object": "model",
            "created": self.loaded_at,
            "owned_by": "luban",
            "context": self.model.spec.context,
            "chat": chat and self.engine is not None,
            **({"parent": self.model.name} if name != self.model.name else {}),
        }

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        self.require(body.model)
        return await self.tokenised(body.answer, self.model)

    async def detokenize(self, body: DetokenizeBody) -> dict[str, str]:
        """The text of token ids."""
        self.require(body.model)
        return await self.tokenised(body.answer, self.model)

    async def embeddings(self, body: EmbeddingBody) -> dict[str, Any]:
        """Unit vectors of texts, means of the last layer's hidden states."""
        self.require(body.model)
        if body.model in self.adapters():
            raise DataError(f"embeddings are those of the model without adapters: ask for '{self.model.name}'")
        self.require_open(0)
        if self.engine is not None and self.engine.divided:
            raise UnsupportedError("no embeddings of a model that plan.tensor divides: serve it in one process")
        width = self.model.spec.width
        if body.dimensions not in (None, width):
            raise DataError(f"'dimensions' must be {width}, the model's width: its embeddings can't be shortened")
        embedder = Embedder(self.model)
        texts = await self.tokenised(lambda: [embedder.tokens_of(text) for text in body.input])
        assert self.worker is not None  # else the request had been answered 503
        self.active += 1
        try:
            vectors = (await self.worker.between_steps(lambda: embedder.embed(texts))).numpy()
        finally:
            self.active -= 1
        if not all(map(bool, (vectors == vectors).all(1))):
            raise LubanError("the model's hidden states are NaN: its weights are damaged, or its precision is too low")
        rows = [
            base64.b64encode(row.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else row.tolist()
            for row in vectors
        ]
        count = sum(map(len, texts))
        return {
            "object": "list",
            "model": self.model.name,
            "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

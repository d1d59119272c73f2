"""The page where people compare two answers, and its routes."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from luban.align.annotate.labels import LabelStore, PersonLabel
from luban.core.errors import DataError, MissingExtra, UsageError
from luban.core.log import say, warn
from luban.core.page import page_style

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse
except ModuleNotFoundError:
    raise MissingExtra("fastapi", "serve", "the annotation page") from None

HERE = Path(__file__).parent
TYPES = {
    "choice": str,
    "grade": (int, type(None)),
    "unsafe_left": bool,
    "unsafe_right": bool,
    "note": str,
    "seconds": (int, float),
}


def create_page(store: LabelStore, seed: int = 0) -> FastAPI:
    """The application. Every route but the page itself wants the annotator's key in X-Key."""
    app = FastAPI(title="Luban annotation", docs_url=None, redoc_url=None, openapi_url=None)
    html = (HERE / "page.html").read_text(encoding="utf-8").replace("/* style */", page_style())

    def state(annotator: str) -> dict[str, Any]:
        pair = store.next_pair(annotator)
        shown = None if pair is None else store.shown(pair, annotator, seed)
        return {"annotator": annotator, "task": shown, "progress": store.progress()}

    @app.middleware("http")
    async def identify(request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/api/"):
            request.state.annotator = store.who(request.headers.get("x-key", ""))
            if request.state.annotator is None:
                return JSONResponse({"error": "unknown key"}, 401)
        return await call_next(request)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return html

    @app.get("/api/task")
    def task(request: Request) -> dict[str, Any]:
        return state(request.state.annotator)

    @app.post("/api/label", response_model=None)
    async def label(request: Request) -> dict[str, Any] | JSONResponse:
        try:
            pair, given = _read_label(await request.json())
            store.label(pair, request.state.annotator, given, seed)
        except (DataError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)
        return state(request.state.annotator)

    @app.post("/api/undo")
    def take_back(request: Request) -> dict[str, Any]:
        pair = store.take_back(request.state.annotator)
        found = state(request.state.annotator)
        if pair is not None:
            found["task"] = store.shown(pair, request.state.annotator, seed)
        return found

    return app


def _read_label(body: Any) -> tuple[int, PersonLabel]:
    """A label of a request's body. DataError for unknown fields and other types."""
    if not isinstance(body, dict) or not isinstance(body.get("pair"), int) or isinstance(body["pair"], bool):
        raise DataError("a label needs the number of its pair")
    fields = {name: value for name, value in body.items() if name != "pair"}
    for name, value in fields.items():
        if name not in TYPES or not isinstance(value, TYPES[name]):  # type: ignore[arg-type]
            raise DataError(f"a label has no field {name}" if name not in TYPES else f"{name} is of another type")
    if "choice" not in fields:
        raise DataError("a label needs a choice")
    return body["pair"], PersonLabel(**fields)


def serve_page(store: LabelStore, host: str, port: int, seed: int = 0) -> None:
    """Serve the page until Ctrl-C.

    Raises UsageError for an address that can't be listened on, or one that others can reach where nobody has a key.
    """
    app = create_page(store, seed)
    import uvicorn

    if not store.annotators and host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(f"at {host} others can reach the page: name those who may label with --annotators NAME=KEY")
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UsageError(f"{host}:{port} can't be listened on: {error.strerror}") from None
    actual = listener.getsockname()[1]
    done = sum(store.progress()["done"].values())
    if not store.annotators:
        warn("there are no --annotators: whoever uses this machine labels as one person")
    say(f"annotation page at http://{host}:{actual}  ({len(store.matches)} pairs, {done} labels so far; Ctrl-C stops)")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()

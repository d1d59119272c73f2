"""The chat page's three files."""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response

PAGE = {
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/chat.js": ("chat.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'"
)


def add_page(app: FastAPI) -> None:
    """The chat page's files, read once."""
    folder = files("luban.serve.api") / "page"
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()

        async def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(
                content,
                media_type=kind,
                headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
            )

        app.get(path, include_in_schema=False)(page)

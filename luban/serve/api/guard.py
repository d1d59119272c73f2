"""What is refused before any route is looked up: requests without the key, and those that a foreign web page sends.

A page of any site can make a browser send requests to a server on the same machine. Where it names the server by an
address, the browser says which site asks (Origin). Where the site's own name was made to point at the server (DNS
rebinding), the browser takes both for one site, and only the name in Host tells.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from luban.serve.api.errors import error_body


class KeyGuard:
    """Refuses everything but `free` without `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str, free: frozenset[str]):
        self.app, self.expected, self.free = app, f"Bearer {key}".encode(), free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in self.free):
            return await self.app(scope, receive, send)
        given = dict(scope.get("headers") or ()).get(b"authorization", b"")
        if hmac.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        body = error_body("a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


class SiteGuard:
    """Refuses requests to another name than the server's, and from pages of other sites.

    Args:
        hosts: names of the server besides addresses, localhost and the machine's own.
        origins: sites whose pages may ask, such as https://chat.example.org.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] = frozenset(), origins: frozenset[str] = frozenset()):
        machine = {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.app, self.hosts, self.origins = app, {host.lower() for host in hosts} | machine, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = None if scope["type"] == "lifespan" else self._problem(Headers(scope=scope))
        if problem is None:
            return await self.app(scope, receive, send)
        await JSONResponse(error_body(problem, code="forbidden"), 403)(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if host and not (_is_address(name) or name == "localhost" or name.endswith(".localhost") or name in self.hosts):
            return f"this server is not known as '{name}': --allowed-host {name} allows the name"
        if origin is None or origin in self.origins or origin in (f"http://{host}", f"https://{host}"):
            return None
        return f"pages of '{origin}' may not use this server: --cors {origin} allows them"


def _name(host: str) -> str:
    """The name in a Host header, without its port and an IPv6 address's brackets."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    """Addresses can't be made to point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

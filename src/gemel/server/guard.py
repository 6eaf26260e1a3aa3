"""Who may use the server: the key, and web pages of strangers.

The key guards every route but /health. Programs send it as `Authorization: Bearer KEY`. A browser cannot send a header when somebody
types an address, so `/` then answers with a form; POST /login trades the key for a cookie that scripts cannot read (HttpOnly), that other
sites cannot use (SameSite=Strict) and that holds a value derived from the key instead of the key.

A server on loopback without a key is still reachable by every page that its user's browser opens. Two checks keep those out: a request
that names its page (`Origin`) must come from our own, which also covers WebSockets, for which browsers ask nobody; and without a key the
name in `Host` must be one of ours, or a page could point a name of its own at 127.0.0.1 and count as our origin (DNS rebinding). There is
no CORS.
"""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gemel.config.server import ServerConfig
from gemel.server.errors import ApiError
from gemel.server.page import login_form

COOKIE = "gemel_session"
_OPEN_PATHS = ("/health", "/login")
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def session_value(api_key: str) -> str:
    """What the cookie holds. It changes with the key and does not reveal it."""
    return hmac.new(api_key.encode(), b"gemel page session", hashlib.sha256).hexdigest()


def same_secret(given: str, wanted: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), wanted.encode())


class Guard:
    """ASGI middleware: 401 without the key, 403 for requests from foreign pages or under foreign names."""

    def __init__(self, app: ASGIApp, config: ServerConfig):
        self.app, self.config = app, config
        names = set(config.allowed_hosts)
        self.names: frozenset[str] | None = None
        if config.host in _LOOPBACK_NAMES:
            self.names = frozenset(names | _LOOPBACK_NAMES)
        elif names:
            self.names = frozenset(names | {config.host})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through or refuse."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, send)
        else:
            await _deny_websocket(refusal, scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        error = self._foreign(headers)
        if error is not None:
            return error.response()
        if self.config.api_key is None or scope["path"] in _OPEN_PATHS or self._has_key(headers, self.config.api_key):
            return None
        if scope["path"] == "/" and "text/html" in headers.get("accept", ""):
            return login_form(401)
        message = "A key is needed: send the header 'Authorization: Bearer KEY' with the key that the server was started with."
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}).response()

    def _has_key(self, headers: Headers, key: str) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return same_secret(given.strip(), key)
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and same_secret(cookie.value, session_value(key))

    def _foreign(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self.config.api_key is None and self.names is not None and _name(host) not in self.names:
            message = f"The server does not answer to the name {_name(host)[:100]!r}; add it to allowed_hosts if it is yours."
            return ApiError(403, message, code="foreign_host")
        origin = headers.get("origin")
        if origin is None:
            return None
        page = urlsplit(origin).netloc
        if page and (page.lower() == host.lower() or _name(page) in self.config.allowed_hosts):
            return None
        return ApiError(403, f"Pages of {origin[:100]!r} may not use this server.", code="foreign_origin")


def _name(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


async def _deny_websocket(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if "websocket.http.response" in scope.get("extensions", {}):
        await refusal(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})

"""The web page: four hand-written files, read once, and the small form that asks for the key.

The Content-Security-Policy lets the page load and call nothing but this server, run no inline script, and (where the browser knows
Trusted Types) turn no string into markup: a model's answer can never become code.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "html": "text/html", "svg": "image/svg+xml"}
_ASSETS = ("style.css", "theme.js", "app.js", "messages.js", "sidebar.js", "panel.js", "api.js", "markdown.js", "store.js", "icon.svg")

_LOGIN_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:100vh;margin:0;background:Canvas;color:CanvasText}"
    "form{display:grid;gap:.75rem;width:min(20rem,90vw)}h1{font-size:1.1rem;font-weight:600;margin:0}"
    "input,button{font:inherit;padding:.6rem .8rem;border-radius:.6rem;border:1px solid GrayText}p{margin:0}"
)
_LOGIN = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Gemel</title>
<style>{style}</style>
<form method="post" action="/login">
<h1>This server asks for its key</h1>
{note}
<input name="key" type="password" aria-label="Key" autocomplete="current-password" autofocus required>
<button>Continue</button>
</form>
</html>
"""


def _file(name: str) -> bytes:
    return (files("gemel.server") / "web" / name).read_bytes()


def login_form(status: int, note: str = "") -> Response:
    """The form, without any script. Its one style sheet is named by its hash."""
    digest = base64.b64encode(hashlib.sha256(_LOGIN_STYLE.encode()).digest()).decode()
    csp = f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    html = _LOGIN.format(style=_LOGIN_STYLE, note=f"<p role=alert>{note}</p>" if note else "")
    return HTMLResponse(html, status_code=status, headers={**_HEADERS, "Cache-Control": "no-store", "Content-Security-Policy": csp})


async def login(request: Request) -> Response:
    """POST /login: the key against a session cookie."""
    from gemel.server.guard import COOKIE, same_secret, session_value
    from gemel.server.service import service_of

    key = service_of(request).config.api_key
    home = RedirectResponse("/", status_code=303)
    if key is None:
        return home
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > 4096:
            return login_form(413, "That is longer than any key.")
    given = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
    if not same_secret(given, key):
        return login_form(401, "This is not the key.")
    home.set_cookie(COOKIE, session_value(key), httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/")
    return home


def page_routes() -> list[Route]:
    """`/`, its files under /web/, and /login."""

    def serve(name: str) -> Route:
        content, media_type = _file(name), _MEDIA_TYPES[name.rpartition(".")[2]]

        async def asset(_: Request) -> Response:
            return Response(content, media_type=media_type, headers={**_HEADERS, "Content-Security-Policy": CSP})

        return Route("/" if name == "index.html" else f"/web/{name}", asset, name=name)

    return [serve("index.html"), *(serve(name) for name in _ASSETS), Route("/login", login, methods=["POST"])]

"""Server-sent events, and noticing at once that nobody listens any more.

An ASGI server tells that a client left only to those who ask with `receive()`. Both ways of answering ask all the time, so an abandoned
request gives its blocks back within an engine step, also when it does not stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemel.server.errors import as_api_error

T = TypeVar("T")

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back otherwise
]


async def unless_gone(receive: Receive, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`, or None when the client left first; then `work` has been cancelled and has cleaned up."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_client_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come.

    A refusal that comes as the first thing has its own HTTP status. Once the stream is open, an error is an event of its own and ends it.
    Silence longer than `keep_alive_s` is broken by comments, which clients skip.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], request_id: str, keep_alive_s: float):
        super().__init__()
        self.events, self.request_id, self.keep_alive_s = events, request_id, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI response."""
        async with aclosing(self.events):
            await unless_gone(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.ensure_future(anext(self.events))
        try:
            await asyncio.wait({first}, timeout=self.keep_alive_s)
            if first.done() and (error := first.exception()) is not None:
                assert isinstance(error, Exception)
                await as_api_error(error, self.request_id).response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send_events(first, send)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def _send_events(self, first: asyncio.Future[bytes], send: Send) -> None:
        self._silent = not first.done()
        ticking = asyncio.create_task(self._break_silence(send))
        try:
            event = await first
            self._silent = False
            await send({"type": "http.response.body", "body": event, "more_body": True})
            async for event in self.events:
                self._silent = False
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            body = as_api_error(error, self.request_id).body
            await send({"type": "http.response.body", "body": b"data: " + json.dumps(body).encode() + b"\n\n", "more_body": True})
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_silence(self, send: Send) -> None:
        while True:
            if self._silent:
                await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            self._silent = True
            await asyncio.sleep(self.keep_alive_s)

"""The HTTP parser with the bounds that uvicorn leaves out.

httptools collects a request's head without a limit and waits for it without an end, so one client could fill memory with one endless
header (as CVE-2025-48956 did elsewhere) or hold thousands of sockets open for nothing. Here the head has a size and a time. Pipelining (a
second request before the first is answered) is refused, because uvicorn stops reading then and would not notice that the first one's
client has left.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gemel.config.server import ServerConfig

_BODY = (
    b'{"error":{"message":"The request line and headers are larger than the server allows.",'
    b'"type":"invalid_request_error","param":null,"code":"head_too_large"}}'
)
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    + f"content-length: {len(_BODY)}\r\n\r\n".encode()
    + _BODY
)


class BoundedHttp(HttpToolsProtocol):
    """One connection. Bytes of a head are counted twice: as they arrive, for a head that never ends, and as they are parsed, for one that
    comes in one piece with what follows it.
    """

    max_head_bytes: ClassVar[int]
    head_timeout_s: ClassVar[float]

    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _arrived_bytes = 0
    _parsed_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected and has `head_timeout_s` to ask for something."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._in_head:
            self._arrived_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._arrived_bytes > self.max_head_bytes:
            self._refuse()

    def on_message_begin(self) -> None:
        """The parser is at a request line."""
        super().on_message_begin()
        self._parsed_bytes = 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole: start the application, unless it is refused."""
        self._in_head = False
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # pipelined
        elif not self.transport.is_closing():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; a head may follow."""
        if self.cycle is not None:
            super().on_message_complete()
        self._in_head, self._arrived_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body; there is no cycle when the head was refused."""
        if self.cycle is not None:
            super().on_body(body)

    def _count(self, num_bytes: int) -> None:
        self._parsed_bytes += num_bytes
        if self._parsed_bytes > self.max_head_bytes:
            self._refuse()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()


def bounded_http(config: ServerConfig) -> type[BoundedHttp]:
    """The protocol class with the limits of `config`; uvicorn makes the instances itself, so they cannot be passed to them."""
    return type("BoundedHttp", (BoundedHttp,), {"max_head_bytes": config.max_head_bytes, "head_timeout_s": config.read_timeout_s})

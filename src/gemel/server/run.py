"""Running the application on a socket: a bounded HTTP parser, and an end in two steps.

The first SIGTERM or Ctrl-C drains: no new connection is accepted, /health turns 503, running requests have `drain_s` to finish, and what is
left then gets an error instead of silence. The second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from gemel.config.server import ServerConfig
from gemel.server.service import Service
from gemel.server.wire import bounded_http

log = logging.getLogger("gemel.server")

_CLOSE_S = 2  # for answers that are written already, and for sockets to close


class DrainingServer(uvicorn.Server):
    """uvicorn, with a shutdown that lets running requests finish first, WebSockets included."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where to find the page, once it is there."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.info("%s is served at http://%s:%d", self.service.model_name, shown, port)
        gc.freeze()  # what start-up made stays; a collection that walked it would stop every stream for a tenth of a second
        config = self.service.config
        if config.api_key is None and host not in ("127.0.0.1", "::1"):
            log.warning("anyone who reaches %s:%d can use this server: set api_key, or listen on 127.0.0.1", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal drains, the second ends the process: nobody who asks twice wants to wait."""
        if self.should_exit:
            log.warning("ended by a second signal")
            logging.shutdown()
            os._exit(128 + sig)
        self.should_exit = True
        log.info("%s: draining for at most %g s; a second signal ends at once", signal.Signals(sig).name, self.service.config.drain_s)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close."""
        for server in self.servers:
            server.close()
        await self.service.llm.close(self.service.config.drain_s)
        await asyncio.sleep(0)  # the routes see their last deltas
        await super().shutdown(sockets)


def make_server(app: Starlette, config: ServerConfig) -> DrainingServer:
    """A server for `app`, not yet running."""
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=bounded_http(config),
        ws="websockets-sansio",
        ws_max_size=config.max_body_bytes,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    return DrainingServer(settings, app.state.service)


def run(app: Starlette, config: ServerConfig) -> None:
    """Serve until a signal has ended it. Returns after a complete drain."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    make_server(app, config).run()

"""The HTTP application, and running it.

Outermost is the access log (it sees everything and lets no exception pass), then the guard, then the routes. The application starts the
engine's thread and ends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route, WebSocketRoute

from gemel.config.errors import GemelError
from gemel.config.server import ServerConfig
from gemel.llm.online import AsyncLLM
from gemel.server import routes
from gemel.server.access import AccessLog
from gemel.server.chat import chat_completions
from gemel.server.completions import completions
from gemel.server.errors import ApiError, handle
from gemel.server.guard import Guard
from gemel.server.metrics import Metrics
from gemel.server.page import page_routes
from gemel.server.service import Service
from gemel.server.websocket import stream


def create_app(llm: AsyncLLM, config: ServerConfig, model_name: str) -> Starlette:
    """The application that serves `llm` under `model_name`. Its lifespan starts and closes `llm`."""
    table: list[Route | WebSocketRoute] = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", routes.models),
        Route("/v1/models/{model_id:path}", routes.model),
        Route("/tokenize", routes.tokenize, methods=["POST"]),
        Route("/detokenize", routes.detokenize, methods=["POST"]),
        Route("/health", routes.health),
        Route("/metrics", routes.metrics),
        Route("/stats", routes.stats),
        WebSocketRoute("/v1/stream", stream),
        *page_routes(),
    ]
    metrics = Metrics(llm, frozenset(route.path for route in table))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await llm.start()
        try:
            yield
        finally:
            await llm.close()

    app = Starlette(
        routes=table,
        middleware=[Middleware(AccessLog, metrics=metrics), Middleware(Guard, config=config)],
        exception_handlers={ApiError: handle, GemelError: handle, HTTPException: handle},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = Service(llm, config, model_name, metrics)
    return app

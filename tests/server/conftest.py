"""How the tests reach the server: in process where no socket matters, through a real uvicorn on a free loopback port where one does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from gemel.config.server import ServerConfig
from gemel.server.app import create_app
from gemel.server.run import make_server
from tests.server.fake_llm import FakeLLM

MODEL = "fake/model"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


def in_process(llm: FakeLLM, config: ServerConfig | None = None) -> httpx.AsyncClient:
    """A client whose requests never touch a socket."""
    app = create_app(llm, config or ServerConfig(), MODEL)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


@asynccontextmanager
async def listening(llm: FakeLLM, config: ServerConfig | None = None) -> AsyncIterator[str]:
    """A real server; yields its address."""
    config = config or ServerConfig()
    server = make_server(create_app(llm, config, MODEL), config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started:
            assert not serving.done(), serving.exception()
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for something that must happen; the limit only ends a test that has failed already."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


def user(text: str = "Hi", **fields: object) -> dict[str, object]:
    """A chat body."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}

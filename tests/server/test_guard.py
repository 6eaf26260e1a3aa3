from __future__ import annotations

import pytest

from gemel.config.errors import ConfigError
from gemel.config.server import ServerConfig
from gemel.server.app import create_app
from tests.server.conftest import MODEL, in_process, user
from tests.server.fake_llm import FakeLLM

pytestmark = pytest.mark.anyio
KEY = "s3cret-Key"


def test_every_route_but_three_needs_the_key(llm: FakeLLM) -> None:
    """An allow list: a route that somebody adds is guarded without being mentioned anywhere."""
    from gemel.server.guard import _OPEN_PATHS

    paths = {route.path for route in create_app(llm, ServerConfig(), MODEL).routes}
    assert set(_OPEN_PATHS) == {"/health", "/login"} and paths > set(_OPEN_PATHS)


async def test_the_key_guards_everything_but_health(llm: FakeLLM) -> None:
    config = ServerConfig(api_key=KEY)
    wrong = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": KEY},
    ]
    wrong += [
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": f"gemel_session={KEY}"},
        {"Cookie": 'x="'},
    ]
    async with in_process(llm, config) as client:
        assert (await client.get("/health")).status_code == 200
        for route in create_app(llm, config, MODEL).routes:
            if route.path in ("/health", "/login") or route.name == "stream":
                continue
            for headers in wrong:
                response = await client.request("POST" if "POST" in route.methods else "GET", route.path, headers=headers)
                assert response.status_code == 401, (route.path, headers)
                assert response.json()["error"]["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"
                assert KEY not in response.text
        assert (await client.get("/no/such/route")).status_code == 401
        good = {"Authorization": f"Bearer {KEY}"}
        assert (await client.post("/v1/chat/completions", json=user(), headers=good)).status_code == 200
        assert (await client.get("/metrics", headers=good)).status_code == 200
    assert len(llm.seen) == 1


async def test_a_browser_logs_in_with_a_form(llm: FakeLLM) -> None:
    async with in_process(llm, ServerConfig(api_key=KEY)) as client:
        form = await client.get("/", headers={"Accept": "text/html,*/*"})
        assert form.status_code == 401 and "<form" in form.text and "<script" not in form.text
        assert "default-src 'none'" in form.headers["content-security-policy"]
        refused = await client.post("/login", data={"key": "wrong"})
        assert refused.status_code == 401 and "set-cookie" not in refused.headers
        assert (await client.post("/login", content=b"key=" + b"x" * 10_000)).status_code == 413
        entered = await client.post("/login", data={"key": KEY})
        assert entered.status_code == 303 and entered.headers["location"] == "/"
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and KEY not in cookie
        page = await client.get("/")
        assert page.status_code == 200 and "app.js" in page.text
        assert (await client.get("/stats")).status_code == 200


async def test_pages_of_strangers_are_kept_out(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        for origin in ("http://evil.example", "null", "http://localhost.evil.example", "http://localhost:9999", "https://", "file://"):
            response = await client.post("/v1/chat/completions", json=user(), headers={"Origin": origin})
            assert response.status_code == 403 and response.json()["error"]["code"] == "foreign_origin", origin
            assert "access-control-allow-origin" not in response.headers
        assert (await client.post("/v1/chat/completions", json=user(), headers={"Origin": "http://localhost"})).status_code == 200
    assert len(llm.seen) == 1


async def test_foreign_names_for_loopback_are_refused(llm: FakeLLM) -> None:
    async with in_process(llm) as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[", "localhost@evil.example"):
            assert (await client.get("/stats", headers={"Host": host})).status_code == 403, host
        for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"):
            assert (await client.get("/stats", headers={"Host": host})).status_code == 200, host
    async with in_process(llm, ServerConfig(allowed_hosts=("models.lan",))) as client:
        assert (await client.get("/stats", headers={"Host": "models.lan:8000"})).status_code == 200
    async with in_process(llm, ServerConfig(host="0.0.0.0")) as client:
        assert (await client.get("/stats", headers={"Host": "anything"})).status_code == 200


def test_keys_that_no_header_can_carry() -> None:
    for key in ("", "ключ", "a\nb", " a", "a "):
        with pytest.raises(ConfigError, match="api_key"):
            ServerConfig.parse({"api_key": key})
    assert KEY not in repr(ServerConfig(api_key=KEY))

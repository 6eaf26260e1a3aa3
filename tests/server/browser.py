"""A browser under test: headless Chromium through its DevTools protocol, over the `websockets` package. Installs nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from websockets import ConnectionClosed
from websockets.asyncio.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--remote-allow-origins=*",
    "--window-size=1280,860",
)  # fmt: skip


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Navigated(AssertionError):
    """The page was left while it was asked something."""


class Page:
    """One tab. `requests` holds every address that it asked for, `problems` its exceptions and console errors."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._answers: dict[int, asyncio.Future[dict]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            try:
                raw = await self.socket.recv()
            except ConnectionClosed:
                return
            message = json.loads(raw)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
                continue
            method, params = message["method"], message["params"]
            if method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.problems.append(
                    str(params["exceptionDetails"].get("exception", {}).get("description", params["exceptionDetails"]["text"]))
                )
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.problems.append(params["entry"]["text"])

    async def command(self, method: str, **params: object) -> dict:
        number = id(answer := asyncio.get_running_loop().create_future()) % 2**31
        self._answers[number] = answer
        await self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        message = await asyncio.wait_for(answer, 30)
        if "navigated" in message.get("error", {}).get("message", ""):
            raise Navigated(message)
        assert "error" not in message, message
        return message["result"]

    async def js(self, expression: str) -> object:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = await self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, limit_s: float = 30.0) -> None:
        """Wait until the expression is true; the limit only ends a test that has failed already."""
        try:
            async with asyncio.timeout(limit_s):
                while not await self._holds(expression):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"never true: {expression}; the page says {await self.js('document.body.innerText')!r}") from None

    async def _holds(self, expression: str) -> bool:
        try:
            return bool(await self.js(f"Boolean({expression})"))
        except Navigated:  # nothing can be said of a page that is gone
            return False

    async def open(self, url: str) -> None:
        await self.command("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && !!document.querySelector('#examples button, form')")

    async def click(self, selector: str) -> None:
        """A real click in the middle of the element."""
        box = await self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'nearest'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2, r.width]; })()"
        )
        assert isinstance(box, list) and box[2] > 0, f"{selector} has no size"
        await self.command("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        for kind in ("mousePressed", "mouseReleased"):
            await self.command("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        await self.command("Input.insertText", text=text)

    async def key(self, key: str, modifiers: int = 0) -> None:
        """A key by name; modifiers 8 is Shift."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.command("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    async def size(self, width: int, height: int, mobile: bool = False) -> None:
        await self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    async def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode((await self.command("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def browser_page(program: str) -> AsyncIterator[Page]:
    """A fresh browser with an empty profile, and its one tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL)
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            async with asyncio.timeout(60):
                while not (port_file.exists() and (lines := port_file.read_text().split())):
                    assert child.returncode is None, f"{program} ended with {child.returncode}"
                    await asyncio.sleep(0.05)
            async with httpx.AsyncClient() as client:
                targets = (await client.get(f"http://127.0.0.1:{lines[0]}/json/list")).json()
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            async with connect(address, max_size=None) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page.command(f"{domain}.enable")
                yield page
        finally:
            child.kill()
            await child.wait()

"""One record per request: what the log line, the metrics and the error messages say about it.

A pure ASGI middleware, because Starlette's `BaseHTTPMiddleware` hides the client's disconnect from the route. It is the outermost of
ours, so that refusals are logged too and no exception passes it.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemel.llm.online import Delta
from gemel.server.errors import as_api_error
from gemel.server.metrics import Metrics

log = logging.getLogger("gemel.access")

CLIENT_GONE = 499  # nginx's number for a client that left before the answer; never sent, only logged
_KEY = "gemel.record"
_ROUTINE = ("/health", "/metrics", "/stats", "/web/")  # polled, or files of the page: their good answers are not worth a line each


@dataclass(slots=True)
class Record:
    """What is known about one request so far. Times are seconds of `time.perf_counter`."""

    metrics: Metrics
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_s: float = field(default_factory=time.perf_counter)
    first_token_s: float | None = None
    status: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish: list[str] = field(default_factory=list)
    user: str | None = None
    metadata: dict[str, str] | None = None
    error: str | None = None
    _cached_prompts: set[int] = field(default_factory=set)
    _begun_s: dict[tuple[int, int], float] = field(default_factory=dict)
    _num_output: dict[tuple[int, int], int] = field(default_factory=dict)

    def saw(self, prompt: int, delta: Delta) -> None:
        """Note a delta of output `delta.index` of prompt number `prompt`."""
        output = (prompt, delta.index)
        if output not in self._begun_s:
            self._saw_first(output, delta)
        self.output_tokens += delta.num_output - self._num_output[output]
        self._num_output[output] = delta.num_output
        if self.first_token_s is None and delta.num_output:
            self.first_token_s = time.perf_counter()
            self.metrics.saw_first_token(self.first_token_s - self.started_s)
        if delta.finish_reason is not None:
            self.finish.append(delta.finish_reason.value)
            if delta.num_output > 1:
                self.metrics.saw_output((time.perf_counter() - self._begun_s[output]) / (delta.num_output - 1))

    def _saw_first(self, output: tuple[int, int], delta: Delta) -> None:
        self._begun_s[output] = time.perf_counter()
        self._num_output[output] = 0
        if output[0] not in self._cached_prompts:  # all outputs of a prompt say the same
            self._cached_prompts.add(output[0])
            self.cached_tokens += delta.cached_tokens

    def line(self, method: str, path: str) -> str:
        """The log line. What a client wrote is escaped: it can neither break the line nor forge another."""
        parts = [method, quote(path), str(self.status), f"id={self.id}", f"total={time.perf_counter() - self.started_s:.3f}s"]
        if self.prompt_tokens:
            parts += [f"prompt={self.prompt_tokens}", f"cached={self.cached_tokens}", f"output={self.output_tokens}"]
        if self.first_token_s is not None:
            parts.append(f"ttft={self.first_token_s - self.started_s:.3f}s")
        if self.finish:
            parts.append(f"finish={','.join(self.finish)}")
        if self.error is not None:
            parts.append(f"error={json.dumps(self.error)}")
        if self.user is not None:
            parts.append(f"user={json.dumps(self.user)}")
        if self.metadata is not None:
            parts.append(f"metadata={json.dumps(self.metadata)}")
        return " ".join(parts)


def record_of(scope: Scope) -> Record:
    """The record of the request that `scope` describes."""
    record = scope[_KEY]
    assert isinstance(record, Record)
    return record


class AccessLog:
    """ASGI middleware: makes the `Record`, answers what nothing below answered, writes the line."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request or one WebSocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        record = scope[_KEY] = Record(self.metrics)
        complete = False

        async def noting(message: Message) -> None:
            nonlocal complete
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                record.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            elif message["type"] == "websocket.accept":
                record.status = 101
            elif message["type"] == "http.response.body":
                complete = complete or not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            answer = as_api_error(error, record.id)
            if record.status is None and scope["type"] == "http":
                await answer.response()(scope, receive, noting)
        finally:
            if scope["type"] == "http" and not complete:
                record.status = CLIENT_GONE
            self.metrics.saw_response(scope["path"], record.status or CLIENT_GONE)
            method = scope.get("method", "WEBSOCKET")
            level = logging.DEBUG if scope["path"].startswith(_ROUTINE) and record.status == 200 else logging.INFO
            log.log(level, "%s", record.line(method, scope["path"]))

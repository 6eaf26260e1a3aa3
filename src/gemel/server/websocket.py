"""WS /v1/stream: one conversation with the sampler, which can be stopped and taken up again.

    client: {"type": "start", ...a chat or completion body}   {"type": "cancel"}   {"type": "continue", "max_tokens": 50}
    server: {"type": "started", "id"}  {"type": "delta", "text", "logprobs"?}...  {"type": "done", "finish_reason", "stop_reason", "usage"}
            {"type": "error", "error": {...}}

One generation runs at a time. `continue` goes on from everything said so far, after a cancel, a length limit or a stop: the text is
resubmitted behind its prompt, whose blocks the prefix cache still holds. A refused message is answered and changes nothing; the socket
stays open.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason
from gemel.server.access import Record, record_of
from gemel.server.access import log as access_log
from gemel.server.body import Json, parse_json
from gemel.server.chat import ChatShape
from gemel.server.completions import CompletionShape
from gemel.server.errors import ApiError, as_api_error
from gemel.server.generate import ledger, usage
from gemel.server.protocol import ChatBody, CompletionBody
from gemel.server.service import Job, Service, service_of


@dataclass(slots=True)
class Line:
    """What was asked for and what has been said so far."""

    job: Job
    shape: ChatShape | CompletionShape
    user: str | None
    metadata: dict[str, str] | None
    text: str = ""
    tokens: list[int] = field(default_factory=list)


class Session:
    """One open socket."""

    def __init__(self, socket: WebSocket):
        self.socket = socket
        self.service: Service = service_of(socket)
        self.id = record_of(socket.scope).id
        self.line: Line | None = None
        self.running: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the client leaves; then whatever runs is aborted."""
        await self.socket.accept()
        try:
            while True:
                message = await self.socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    await self._handle(message)
                except Exception as error:
                    await self._send_error(error)
        finally:
            await self._cancel()

    async def _handle(self, message: Message) -> None:
        text = message.get("text")
        if not isinstance(text, str):
            raise ApiError(400, "Messages are JSON in text frames.", code="invalid_json")
        value = await asyncio.to_thread(parse_json, text.encode())
        kind = value.pop("type", None) if isinstance(value, dict) else None
        if kind == "start":
            self._refuse_while_running()
            self.line = await self._start(value)
            self.running = asyncio.create_task(self._generate(self.line, self.line.job))
        elif kind == "continue":
            self._refuse_while_running()
            assert isinstance(value, dict)
            line, job = await self._continuation(value)
            self.running = asyncio.create_task(self._generate(line, job))
        elif kind == "cancel":
            if self.running is None or self.running.done():
                raise ApiError(400, "Nothing is running, so there is nothing to cancel.", param="type")
            await self._cancel()
        else:
            raise ApiError(400, "'type' must be 'start', 'cancel' or 'continue'.", param="type")

    def _refuse_while_running(self) -> None:
        if self.running is not None and not self.running.done():
            raise ApiError(409, "A generation is running on this socket: cancel it, wait for it, or open another.", param="type")

    async def _start(self, value: Json) -> Line:
        service = self.service
        body: ChatBody | CompletionBody
        shape: ChatShape | CompletionShape
        if isinstance(value, dict) and "messages" in value:
            body = await service.parse(ChatBody, value)
            job, shape = await service.chat_job(body), ChatShape(service, self.id)
        else:
            body = await service.parse(CompletionBody, value)
            job, shape = await service.completion_job(body), CompletionShape(service, self.id)
        if len(job.prompts) > 1 or job.params.n > 1 or job.params.beam_width is not None:
            raise ApiError(400, "A socket carries one output: give one prompt, n = 1 and no beam_width, or use the HTTP routes.", param="n")
        return Line(job, shape, body.user, body.metadata)

    async def _continuation(self, value: dict[str, Json]) -> tuple[Line, Job]:
        if self.line is None:
            raise ApiError(400, "There is nothing to continue: send a 'start' first.", param="type")
        limit = value.pop("max_tokens", None)
        if limit is not None and type(limit) is not int:
            raise ApiError(400, "'max_tokens' must be a whole number.", param="max_tokens", code="invalid_value")
        if value:
            raise ApiError(400, f"A 'continue' takes only 'max_tokens', not {sorted(value)[0][:80]!r}.", code="unknown_field")
        line, service = self.line, self.service
        said = await asyncio.to_thread(self._said, line)
        prompt = (*line.job.prompts[0], *said)
        params = line.job.params
        if limit is not None:
            params = SamplingParams.parse(params.model_dump(exclude_unset=True) | {"max_tokens": limit})
        service.check_length(len(prompt), params.max_tokens or 0, "prompt")
        return line, Job((prompt,), params, line.job.priority, line.job.salt)

    def _said(self, line: Line) -> list[int]:
        """Ids of the text that the client has seen: those that were generated, unless a stop string cut the text within them."""
        tokenizer = self.service.llm.tokenizer
        if tokenizer.decode(line.tokens, continues=True) == line.text:
            return line.tokens
        return tokenizer.encode(line.text, add_bos=False)

    async def _generate(self, line: Line, job: Job) -> None:
        record = Record(self.service.metrics, user=line.user, metadata=line.metadata, status=200)
        reason: str = "cancelled"
        stop: str | int | None = None
        try:
            await self.socket.send_json({"type": "started", "id": record.id})
            async with aclosing(ledger(self.service, job, record)) as deltas:
                async for _, delta in deltas:
                    line.text += delta.text
                    line.tokens.extend(delta.tokens)
                    if delta.text or delta.logprobs:
                        extra = {"logprobs": line.shape.logprobs(0, delta.logprobs)} if delta.logprobs else {}
                        await self.socket.send_json({"type": "delta", "text": delta.text} | extra)
                    if delta.finish_reason is not None:
                        reason, stop = delta.finish_reason.value, delta.stop_reason
        except asyncio.CancelledError:
            record.finish.append(FinishReason.ABORT.value)
        except Exception as error:
            record.status = as_api_error(error, record.id).status
            await self._send_error(error)
            return
        finally:
            access_log.info("%s", record.line("WEBSOCKET", "/v1/stream"))
        done = {"type": "done", "finish_reason": reason, "stop_reason": stop, "usage": usage(record)}
        with suppress(RuntimeError, WebSocketDisconnect):  # the client may have left
            await self.socket.send_json(done)

    async def _send_error(self, error: Exception) -> None:
        with suppress(RuntimeError, WebSocketDisconnect):
            await self.socket.send_json({"type": "error", **as_api_error(error, self.id).body})

    async def _cancel(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)


async def stream(socket: WebSocket) -> None:
    """The route."""
    await Session(socket).run()

"""From a job to what its client reads: one whole answer, or a stream of events.

The two OpenAI routes differ in how they write things down, not in what happens; `Shape` is that difference, and `chat.py` and
`completions.py` are its two cases. `ledger` is what happens: it runs a job's prompts side by side and turns a failed output into an
exception.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemel.engine.request import FinishReason, TokenLogprob
from gemel.llm.online import Delta
from gemel.server.access import Record, record_of
from gemel.server.errors import ApiError
from gemel.server.protocol import ChatBody, CompletionBody
from gemel.server.service import Job, Service
from gemel.server.stream import EventStream, unless_gone

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make a new one for every token
_MARK = secrets.token_hex(16)  # stands for the text in an event; nobody can name a model or a request so


@dataclass(slots=True)
class Choice:
    """One output as far as it has come."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_output: int = 0

    def add(self, delta: Delta) -> None:
        """Take in what came."""
        self.text.append(delta.text)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason, self.stop_reason, self.num_output = delta.finish_reason, delta.stop_reason, delta.num_output


class Shape(Protocol):
    """How one of the OpenAI routes writes answers down."""

    def opening(self, index: int) -> list[dict[str, object]]:
        """Chunks that come before the text of choice `index`."""

    def chunk(self, index: int, delta: Delta) -> dict[str, object]:
        """A piece of choice `index`."""

    def usage_chunk(self, usage: dict[str, object]) -> dict[str, object]:
        """The last chunk, with no choices."""

    def whole(self, choices: Sequence[Choice], usage: dict[str, object]) -> dict[str, object]:
        """The answer in one piece."""


async def answer(request: Request, service: Service, body: ChatBody | CompletionBody, job: Job, shape: Shape) -> Response:
    """Run the job for this client, as a stream if the body asks for one. The client's leaving aborts it, either way."""
    record = record_of(request.scope)
    record.user, record.metadata = body.user, body.metadata
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(events(service, job, shape, record, with_usage), record.id, service.config.keep_alive_s)
    choices = await unless_gone(request.receive, collect(service, job, record))
    if choices is None:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(shape.whole(choices, usage(record)))


async def collect(service: Service, job: Job, record: Record) -> list[Choice]:
    """Every output, complete."""
    n = job.params.n
    choices = [Choice() for _ in range(len(job.prompts) * n)]
    async with aclosing(ledger(service, job, record)) as deltas:
        async for prompt, delta in deltas:
            choices[prompt * n + delta.index].add(delta)
    return choices


async def events(service: Service, job: Job, shape: Shape, record: Record, with_usage: bool) -> AsyncGenerator[bytes, None]:
    """The outputs as server-sent events, ended by OpenAI's [DONE]. With usage, every chunk but the last has `usage: null`."""
    extra: dict[str, object] = {"usage": None} if with_usage else {}
    around_text: dict[int, tuple[bytes, bytes]] = {}
    async with aclosing(ledger(service, job, record)) as deltas:
        async for prompt, delta in deltas:
            index = prompt * job.params.n + delta.index
            if index not in around_text:
                around_text[index] = _around_text(shape, index, extra)
                for chunk in shape.opening(index):
                    yield sse(chunk | extra)
            if delta.logprobs or delta.finish_reason is not None:
                yield sse(shape.chunk(index, delta) | extra)
            elif delta.text:
                before, after = around_text[index]
                yield before + _ENCODER.encode(delta.text).encode() + after
    if with_usage:
        yield sse(shape.usage_chunk(usage(record)))
    yield b"data: [DONE]\n\n"


def _around_text(shape: Shape, index: int, extra: dict[str, object]) -> tuple[bytes, bytes]:
    """What comes before and after the text in an event that brings nothing but text, as nearly all do: they differ in nothing else."""
    event = sse(shape.chunk(index, Delta(index, _MARK, (), (), None, None, 0, 0, 0)) | extra)
    before, _, after = event.partition(_ENCODER.encode(_MARK).encode())
    return before, after


def sse(value: dict[str, object]) -> bytes:
    """One server-sent event. JSON on one line holds no newline, so one `data:` line is enough."""
    return b"data: " + _ENCODER.encode(value).encode() + b"\n\n"


def usage(record: Record) -> dict[str, object]:
    """Tokens as OpenAI counts them: the prompt once, however many outputs share it."""
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": record.prompt_tokens + record.output_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


async def ledger(service: Service, job: Job, record: Record) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of all prompts of a job as (prompt number, delta), noted in the record. Raises `ApiError` when an output fails.

    Closing it aborts what still runs.
    """
    record.prompt_tokens = sum(len(ids) for ids in job.prompts)
    if len(job.prompts) == 1:  # by far the most frequent: no queue between
        async with aclosing(_stream(service, job, record.id, 0)) as deltas:
            async for delta in deltas:
                _note(record, 0, delta)
                yield 0, delta
        return
    async with aclosing(_merged(service, job, record.id)) as pairs:
        async for prompt, delta in pairs:
            _note(record, prompt, delta)
            yield prompt, delta


def _note(record: Record, prompt: int, delta: Delta) -> None:
    record.saw(prompt, delta)
    if delta.finish_reason is FinishReason.ERROR:
        record.error = delta.error
        raise ApiError(500, f"The engine failed on this request. The log has the reason under {record.id}.", code="engine_error")
    if delta.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "The request was ended by the server, which is shutting down.", code="aborted")


def _stream(service: Service, job: Job, request_id: str, number: int) -> AsyncGenerator[Delta, None]:
    name = request_id if len(job.prompts) == 1 else f"{request_id}-{number}"
    return service.llm.generate(job.prompts[number], job.params, request_id=name, priority=job.priority, salt=job.salt)


async def _merged(service: Service, job: Job, request_id: str) -> AsyncGenerator[tuple[int, Delta], None]:
    """Several prompts side by side."""
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

    async def pump(number: int) -> None:
        try:
            async with aclosing(_stream(service, job, request_id, number)) as deltas:
                async for delta in deltas:
                    arrived.put_nowait((number, delta))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    pumps = [asyncio.create_task(pump(number)) for number in range(len(job.prompts))]
    try:
        running = len(pumps)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

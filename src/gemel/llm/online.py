"""A model as a service inside one process: many callers of one event loop, one engine in a thread of its own.

    event loop    generate() --command-->  thread    add, abort, step, detokenize, stop strings
                  mailboxes  <--one call per step--

The engine is touched by that thread only. Callers talk to it through a list of commands under a condition, on which the
thread sleeps when there is nothing to do. After every step it posts all deltas with a single `call_soon_threadsafe`,
because waking an event loop costs far more than the deltas themselves.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemel.config.engine import EngineConfig
from gemel.config.errors import CapacityError, GemelError, RequestError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import EngineStats, FinishReason, Request
from gemel.llm.engine import Deltas, TextEngine, load, log
from gemel.llm.text import Delta

if TYPE_CHECKING:
    from gemel.engine.engine import Engine
    from gemel.tokenizer.tokenizer import Tokenizer

__all__ = ["AsyncLLM", "Delta"]

Letter = Delta | Exception


class Mailbox:
    """Where one caller waits for letters, all within one event loop. asyncio.Queue does more and takes three times as long."""

    __slots__ = ("_letters", "_waiting")

    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, letter: Letter) -> None:
        """Never waits."""
        self._letters.append(letter)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> Letter:
        """The oldest letter. One caller only."""
        while not self._letters:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._letters.popleft()


Mail = list[tuple[Mailbox, Letter]]


class AsyncLLM:
    """A running model. `start` it in the event loop that uses it, `close` it there."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine  # plain attributes (max_context, vocab_size...) may be read by anyone
        self.tokenizer = tokenizer
        self._worker = _Worker(TextEngine(engine, tokenizer))
        self._active: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @classmethod
    def load(cls, model: str | Path, config: EngineConfig | None = None) -> Self:
        """From a path or an embedded model's name. Raises CheckpointError, UnsupportedError or ConfigError."""
        return cls(*load(model, config, chat=True))

    @property
    def draining(self) -> bool:
        """True once `close` was called: new requests are refused."""
        return self._draining

    @property
    def healthy(self) -> bool:
        """Whether tokens can be expected: the thread runs, its last step was not all errors, and its checks passed."""
        return self._worker.healthy

    def stats(self) -> EngineStats:
        """The engine's state now."""
        return self.engine.stats()

    async def start(self) -> None:
        """Start the thread. Raises CheckpointError when the model's chat template does not compile."""
        await asyncio.to_thread(self.tokenizer.warm_up)
        self._worker.start(asyncio.get_running_loop())

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams | None = None, *, request_id: str, priority: int = 0, salt: str = ""
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of all `params.n` outputs as they come; the last one of each has a `finish_reason`.

        Closing the generator or cancelling its consumer aborts the request within one step. Raises RequestError for a request that can
        never be served, CapacityError when the queue is full or the service is closing.
        """
        if self._draining or not self._worker.running:
            raise CapacityError(
                f"the model {'is closing' if self._draining else 'has not been started'} and takes no requests; try again later"
            )
        if request_id in self._active:
            raise RequestError(f"request id {request_id!r} is in use; choose another", "request_id")
        params = params or SamplingParams()
        request = Request(request_id, tuple(prompt), params, priority, salt)
        mail = Mailbox()
        num_open = params.n
        self._active.add(request_id)
        self._idle.clear()
        self._worker.do(partial(self._worker.add, request, mail))
        try:
            while num_open:
                item = await mail.get()
                if isinstance(item, Exception):
                    num_open = 0
                    raise item
                num_open -= item.finish_reason is not None
                yield item
        finally:
            if num_open:
                self.abort(request_id)
            self._active.discard(request_id)
            if not self._active:
                self._idle.set()

    def abort(self, request_id: str) -> None:
        """End a request, if it runs; whoever iterates over it gets last deltas with ABORT. May be called from any thread."""
        self._worker.do(partial(self._worker.abort, request_id))

    async def close(self, drain_s: float = 0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, abort the rest, end the thread.

        A second call with a shorter `drain_s` cuts the first one short. Closing twice is harmless.
        """
        self._draining = True
        if self._active and drain_s > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), drain_s)
            except TimeoutError:
                log.warning("%d requests did not end within %g s and are aborted", len(self._active), drain_s)
        await asyncio.to_thread(self._worker.stop)


class _Worker:
    """The thread with the engine. `add` and `abort` run on it as commands; the rest may be called from anywhere."""

    def __init__(self, text_engine: TextEngine):
        self._engine = text_engine
        self._mailboxes: dict[str, Mailbox] = {}
        self._commands: list[Callable[[], Mail]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="gemel-engine", daemon=True)
        self._producing = True
        self._sound = True

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        return self.running and self._producing and self._sound

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Abort everything and wait for the thread to end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def do(self, command: Callable[[], Mail]) -> None:
        """Have `command` run on the thread before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def add(self, request: Request, mail: Mailbox) -> Mail:
        try:
            self._engine.add(request)
        except Exception as error:
            if not isinstance(error, GemelError):
                log.exception("the engine failed to take request %r", request.id)
                self._sound = False
            return [(mail, error)]
        self._mailboxes[request.id] = mail
        return []

    def abort(self, request_id: str) -> Mail:
        return self._addressed(self._engine.abort(request_id))

    def _run(self) -> None:
        checked = False
        while True:
            stopping, commands = self._next(wait=checked)
            mail = [letter for command in commands for letter in command()]
            if stopping:
                mail += self._addressed(self._engine.abort_all())
            elif self._engine.has_work:
                mail += self._addressed(self._step())
                checked = False
            elif not checked:
                self._check()
                checked = True
            self._post(mail)
            if stopping:
                return

    def _next(self, wait: bool) -> tuple[bool, list[Callable[[], Mail]]]:
        """Whether to stop, and what was asked for since the last call. With `wait`, sleep until there is either."""
        with self._wake:
            while wait and not self._commands and not self._stopping:
                self._wake.wait()
            commands, self._commands = self._commands, []
            return self._stopping, commands

    def _step(self) -> Deltas:
        deltas = self._engine.step()
        if deltas:
            self._producing = any(delta.finish_reason is not FinishReason.ERROR for _, delta in deltas)
        return deltas

    def _check(self) -> None:
        try:
            self._engine.engine.check()
        except Exception:
            log.exception("the engine is idle but not in order")
            self._sound = False

    def _addressed(self, deltas: Deltas) -> Mail:
        mail: Mail = [(self._mailboxes[request_id], delta) for request_id, delta in deltas]
        for request_id, delta in deltas:
            if delta.finish_reason is not None and request_id not in self._engine:
                self._mailboxes.pop(request_id, None)
        return mail

    def _post(self, mail: Mail) -> None:
        if mail and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(_deliver, mail)
            except RuntimeError:  # the loop was closed without closing us
                log.warning("the event loop is gone; the engine stops")
                self._stopping = True


def _deliver(mail: Mail) -> None:
    for mailbox, letter in mail:
        mailbox.put(letter)

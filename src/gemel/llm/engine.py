"""The engine with text on top: what the offline and the online front end have in common.

Both add requests, step, and hand out deltas; they differ in who waits for them.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gemel.config.engine import EngineConfig
from gemel.engine.request import FinishReason, Output, Request
from gemel.llm import store
from gemel.llm.text import Delta, RequestText
from gemel.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemel.engine.engine import Engine

log = logging.getLogger("gemel.llm")
NOTHING_DONE_S = 0.001

Deltas = list[tuple[str, Delta]]  # with the id of the request


def load(model: str | Path, config: EngineConfig | None, chat: bool = False) -> tuple[Engine, Tokenizer]:
    """The engine and the tokenizer of `model`: a Hugging Face directory, a GGUF file, or the name of an embedded model.

    `chat`: conversations are expected, so the tokenizer warms up while the engine loads.
    """
    path = store.resolve(model)
    tokenizer = Tokenizer.load(path)  # first: it is quick, and a mistake in the path shows at once
    with _collector_paused(), ThreadPoolExecutor(1) as beside:
        warm = beside.submit(tokenizer.warm_up) if chat else None
        from gemel.engine.engine import Engine

        engine = Engine.load(path, config)
        if warm is not None:
            warm.result()
    return engine, tokenizer


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Importing torch makes a million objects that stay; walking them over and over would take a sixth of the start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class TextEngine:
    """One engine, its tokenizer, and the text of the requests in it. Not thread-safe, as the engine is not."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine
        self.tokenizer = tokenizer
        self._texts: dict[str, RequestText] = {}

    @property
    def has_work(self) -> bool:
        """True while a step could do something."""
        return self.engine.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError when it can never be served, CapacityError when the queue is full."""
        self.engine.add(request)
        self._texts[request.id] = RequestText(self.tokenizer, request.params, len(request.prompt))

    def abort(self, request_id: str) -> Deltas:
        """End a request, if it is there, and free what it holds."""
        text = self._texts.pop(request_id, None)
        self.engine.abort(request_id)
        return [(request_id, delta) for delta in text.end(FinishReason.ABORT)] if text else []

    def abort_all(self) -> Deltas:
        """End everything."""
        return [pair for request_id in list(self._texts) for pair in self.abort(request_id)]

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._texts

    def step(self) -> Deltas:
        """Advance the engine by one step. An exception out of it, a bug of ours, ends all requests with ERROR and is logged.

        When the engine chose to do nothing (it may wait for a batch to fill), this sleeps for a moment: callers may loop without spinning.
        """
        try:
            num_steps = self.engine.num_steps
            outputs = self.engine.step()
            if not outputs and num_steps == self.engine.num_steps:
                time.sleep(NOTHING_DONE_S)
            return self._deltas(outputs)
        except Exception as error:
            log.exception("the engine failed; its %d requests end", len(self._texts))
            return self._end_all(f"the engine failed: {type(error).__name__}: {error}")

    def _deltas(self, outputs: list[Output]) -> Deltas:
        deltas: Deltas = []
        failed: dict[str, str | None] = {}
        for output in outputs:
            text = self._texts.get(output.request_id)
            delta = text.take(output) if text else None
            if text is None or delta is None:
                continue
            deltas.append((output.request_id, delta))
            if delta.finish_reason is not None and output.finish_reason is None:
                self.engine.stop(output.request_id, output.index)
            if output.finish_reason is FinishReason.ERROR:
                failed[output.request_id] = output.error
            if not text.is_open:
                del self._texts[output.request_id]
        return deltas + self._end_unmentioned(failed)

    def _end_unmentioned(self, failed: dict[str, str | None]) -> Deltas:
        """A request that fails before its prompt is computed has no further outputs yet; those that the caller waits for end with it."""
        deltas: Deltas = []
        for request_id, error in failed.items():
            if text := self._texts.get(request_id):
                deltas += [(request_id, delta) for delta in text.end(FinishReason.ERROR, error, unmentioned=True)]
                if not text.is_open:
                    del self._texts[request_id]
        return deltas

    def _end_all(self, error: str) -> Deltas:
        deltas: Deltas = []
        for request_id, text in self._texts.items():
            deltas += [(request_id, delta) for delta in text.end(FinishReason.ERROR, error)]
            with contextlib.suppress(Exception):  # the engine is in doubt; check() will tell
                self.engine.abort(request_id)
        self._texts.clear()
        return deltas

"""An engine without a model: deterministic tokens, the same methods, and failures on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gemel.config.errors import CapacityError, RequestError
from gemel.engine.request import EngineStats, FinishReason, Output, Request, TokenLogprob

STOP_TOKEN = 7


class FakeEngine:
    """Output `index` of a request says its prompt again and again, starting at token `index`, one token per step.

    It asserts that only one thread touches it, and that nothing is asked of requests that are gone.
    """

    max_context = 1000
    vocab_size = 1000
    eos_token_ids = (STOP_TOKEN,)

    def __init__(self, max_waiting: int = 1000, step_s: float = 0.0, idle_steps: int = 0):
        self.max_waiting = max_waiting
        self.step_s = step_s
        self.idle_steps = idle_steps  # steps in which it chooses to do nothing
        self.jobs: dict[str, tuple[Request, dict[int, int]]] = {}  # request, tokens so far of each live output
        self.num_calls = 0
        self.num_steps = 0
        self.num_output = 0
        self.num_checks = 0
        self.aborted: list[str] = []
        self.stopped: list[tuple[str, int]] = []
        self.fail: Callable[[int], None] = lambda step: None
        self.broken = False
        self.thread: int | None = None

    def own(self) -> None:
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident(), "the engine was touched by two threads"

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    def add(self, request: Request) -> None:
        self.own()
        if len(self.jobs) >= self.max_waiting:
            raise CapacityError(f"{len(self.jobs)} requests wait; the limit is {self.max_waiting}: try again later")
        if not request.prompt:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        assert request.id not in self.jobs
        self.jobs[request.id] = (request, dict.fromkeys(range(request.params.n), 0))

    def abort(self, request_id: str) -> None:
        self.own()
        if self.jobs.pop(request_id, None):
            self.aborted.append(request_id)

    def stop(self, request_id: str, index: int) -> None:
        self.own()
        self.stopped.append((request_id, index))
        if request_id in self.jobs:
            self.end(request_id, index)

    def end(self, request_id: str, index: int) -> None:
        live = self.jobs[request_id][1]
        del live[index]
        if not live:
            del self.jobs[request_id]

    def step(self) -> list[Output]:
        self.own()
        self.num_calls += 1
        if self.idle_steps:
            self.idle_steps -= 1
            return []
        self.num_steps += 1
        time.sleep(self.step_s)
        self.fail(self.num_steps)
        return [self.advance(request, index) for request, live in list(self.jobs.values()) for index in list(live)]

    def advance(self, request: Request, index: int) -> Output:
        params, live = request.params, self.jobs[request.id][1]
        token = request.prompt[(index + live[index]) % len(request.prompt)]
        ends = token == STOP_TOKEN and not params.ignore_eos
        live[index] += not ends
        self.num_output += not ends
        reason = FinishReason.STOP if ends else FinishReason.LENGTH if live[index] == (params.max_tokens or 1000) else None
        logprobs = (TokenLogprob(token, -0.5, ((token, -0.5),)),) if params.logprobs is not None and not ends else ()
        total = live[index]
        if reason:
            self.end(request.id, index)
        return Output(
            request.id,
            index,
            () if ends else (token,),
            total,
            logprobs,
            reason,
            token if ends else None,
            cached_tokens=len(request.prompt) // 2,
            cumulative_logprob=-0.5 * total,
        )

    def stats(self) -> EngineStats:
        return EngineStats(0, len(self.jobs), 10, len(self.jobs), 0, self.num_steps, 0, self.num_output, 0, {}, 0, {})

    def check(self) -> None:
        self.own()
        self.num_checks += 1
        assert not self.broken, "a block leaked"

"""A stand-in for `AsyncLLM` with its contract and none of its weight: the text is known, time and failure are under the test's hand.

One token is one UTF-8 byte plus 3 (0 ends the text, 1 and 2 mark turns). The answer to any prompt is `reply`, cut at `max_tokens` and
stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace

from gemel.config import CapacityError, RequestError, SamplingParams
from gemel.engine.request import EngineStats, FinishReason, TokenLogprob
from gemel.llm.online import Delta

FIRST_BYTE = 3


class FakeTokenizer:
    vocab_size = 256 + FIRST_BYTE
    shows_tools = True

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [byte + FIRST_BYTE for byte in text.encode()]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - FIRST_BYTE]) if token >= FIRST_BYTE else b""

    def decode(self, ids: Sequence[int], continues: bool = False) -> str:
        return bytes(token - FIRST_BYTE for token in ids if token >= FIRST_BYTE).decode("utf-8", "replace")

    def render_chat(self, messages, tools=None, add_generation_prompt=True, continue_final_message=False) -> list[int]:
        ids: list[int] = self.encode(f"tools:{[t['function']['name'] for t in tools]}") if tools and self.shows_tools else []
        for message in messages:
            ids += [1, *self.encode(f"{message['role']}: {message['content']}"), 2]
        if continue_final_message:
            return ids[:-1]
        return [*ids, 1] if add_generation_prompt else ids


class FakeLLM:  # the contract of gemel.llm.online.AsyncLLM
    def __init__(self, reply: str = "Hello from the fake model.", delay_s: float = 0.0, max_context: int = 8192):
        self.reply, self.delay_s = reply, delay_s
        self.tokenizer = FakeTokenizer()
        self.engine = SimpleNamespace(max_context=max_context, vocab_size=FakeTokenizer.vocab_size)
        self.healthy, self.draining = True, False
        self.started = asyncio.Event()
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.seen: list[tuple[tuple[int, ...], SamplingParams, int, str]] = []
        self.refuse: Exception | None = None  # raised when a request is added
        self.fail_after: int | None = None  # the engine reports an error after so many tokens
        self.crash_after: int | None = None  # generate() itself raises after so many tokens
        self.prompt_tokens = self.output_tokens = 0
        self.finished: dict[str, int] = {}
        self._closing = asyncio.Event()

    async def start(self) -> None:
        self.started.set()

    async def close(self, drain_s: float = 0) -> None:
        self.draining = True
        end_s = asyncio.get_running_loop().time() + drain_s
        while self.running and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(0.01)
        self._closing.set()
        while self.running:
            await asyncio.sleep(0.01)
        self.healthy = False

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting=0,
            running=len(self.running),
            blocks_total=100,
            blocks_used=3 * len(self.running),
            blocks_cached=7,
            steps=self.output_tokens,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            prefix_hit_tokens=30,
            prefix_misses={"cold": 60, "partial": 10},
            preemptions=1,
            finished=dict(self.finished),
        )

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, request_id: str, priority: int = 0, salt: str = ""
    ) -> AsyncGenerator[Delta, None]:
        if self.draining:
            raise CapacityError("the server is draining: it takes no new requests")
        if self.refuse is not None:
            raise self.refuse
        if max(params.logit_bias, default=0) >= self.tokenizer.vocab_size:
            raise RequestError(f"logit_bias names a token beyond the vocabulary of {self.tokenizer.vocab_size}", "logit_bias")
        self.seen.append((tuple(prompt), params, priority, salt))
        self.running.add(request_id)
        self.prompt_tokens += len(prompt)
        done = False
        try:
            async for delta in self._deltas(len(prompt), params):
                yield delta
            done = True
        finally:
            self.running.discard(request_id)
            if not done:
                self.aborted.append(request_id)

    async def _deltas(self, num_prompt: int, params: SamplingParams) -> AsyncGenerator[Delta, None]:
        tokens = self.tokenizer.encode(self.reply)
        limit = params.max_tokens or self.engine.max_context - num_prompt
        said = [b""] * params.n
        alive = set(range(params.n))

        def end(index: int, count: int, reason: FinishReason, stop: str | int | None = None, error: str | None = None) -> Delta:
            alive.discard(index)
            self.finished[reason] = self.finished.get(reason, 0) + 1
            return Delta(index, "", (), (), reason, stop, num_prompt, count, 4, error)

        for position in range(min(limit, len(tokens)) + 1):
            await asyncio.sleep(self.delay_s)
            for index in sorted(alive):
                stop = next((s for s in params.stop if said[index].endswith(s.encode())), None)
                if self.crash_after == position:
                    raise RuntimeError("secret inside of the engine")
                if self._closing.is_set():
                    yield end(index, position, FinishReason.ABORT)
                elif self.fail_after == position:
                    yield end(index, position, FinishReason.ERROR, error="NaN in the logits of layer 3")
                elif stop is not None:
                    yield end(index, position, FinishReason.STOP, stop)
                elif position == len(tokens):
                    yield end(index, position, FinishReason.STOP)
                elif position == limit:
                    yield end(index, position, FinishReason.LENGTH)
                else:
                    token = tokens[position]
                    self.output_tokens += 1
                    before = said[index].decode("utf-8", "ignore")
                    said[index] += bytes([token - FIRST_BYTE])
                    text = said[index].decode("utf-8", "ignore")[len(before) :]
                    yield Delta(index, text, (token,), self._logprobs(token, params), None, None, num_prompt, position + 1, 4)

    def _logprobs(self, token: int, params: SamplingParams) -> tuple[TokenLogprob, ...]:
        if params.logprobs is None:
            return ()
        return (TokenLogprob(token, -0.5, tuple((FIRST_BYTE + ord("a") + k, -0.5 - k) for k in range(params.logprobs))),)

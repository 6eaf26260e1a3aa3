"""Batches: all prompts in, all completions out, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemel.config.engine import EngineConfig
from gemel.config.errors import CapacityError, GemelError, RequestError
from gemel.config.sampling import SamplingParams
from gemel.engine.request import FinishReason, Request, TokenLogprob
from gemel.llm.engine import TextEngine, load
from gemel.llm.text import Delta

if TYPE_CHECKING:
    from gemel.engine.engine import Engine
    from gemel.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Encode = Callable[[], Sequence[int]]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One way in which a prompt was continued.

    `tokens` are ids. `logprobs` has one entry per token when they were asked for. `stop_reason` is the stop string or the
    id of the stop token that ended it. `cumulative_logprob` is None unless log-probabilities or beams were asked for. `error` says
    what went wrong when `finish_reason` is ERROR.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of prompt number `index`: its token ids, its `SamplingParams.n` outputs, and what the prefix cache saved."""

    index: int
    prompt_tokens: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    def as_json(self) -> dict[str, object]:
        """Plain data for `json.dumps`; token counts, not ids, of the prompt."""
        outputs: list[dict[str, object]] = []
        for output in self.outputs:
            said: dict[str, object] = {"text": output.text, "tokens": list(output.tokens), "finish_reason": str(output.finish_reason)}
            said |= {"stop_reason": output.stop_reason, "cumulative_logprob": output.cumulative_logprob, "error": output.error}
            if output.logprobs:
                said["logprobs"] = [{"token": item.token, "logprob": item.logprob, "top": item.top} for item in output.logprobs]
            outputs.append(said)
        return {"index": self.index, "prompt_tokens": len(self.prompt_tokens), "cached_tokens": self.cached_tokens, "outputs": outputs}


class LLM:
    """A model for batches.

        llm = LLM("path/to/model")
        for completion in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(completion.text)

    Not thread-safe. Raises CheckpointError, UnsupportedError or ConfigError when the model cannot be loaded.
    """

    def __init__(self, model: str | Path, config: EngineConfig | None = None):
        self._set(*load(model, config))

    @classmethod
    def over(cls, engine: Engine, tokenizer: Tokenizer) -> Self:
        """On an engine that exists already and is used by nobody else."""
        self = cls.__new__(cls)
        self._set(engine, tokenizer)
        return self

    def _set(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._text_engine = TextEngine(engine, tokenizer)
        self._ids = count()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, progress: bool = True
    ) -> list[Completion]:
        """Continue every prompt (text or token ids). `params`: one for all, or one for each.

        A prompt that is refused or fails gets outputs with `finish_reason` ERROR and the reason; the others go on. An
        interrupt (Ctrl-C) ends all of them, frees the engine, and is raised again.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is a string; pass a list of prompts, if need be of one", "prompts")
        return self._run([partial(self._encode, prompt) for prompt in prompts], params, progress)

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, object]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Answer every conversation (a list of messages with `role` and `content`) through the model's chat template."""
        return self._run([partial(self.tokenizer.render_chat, messages) for messages in conversations], params, progress)

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _run(self, prompts: list[Encode], params: SamplingParams | Sequence[SamplingParams] | None, progress: bool) -> list[Completion]:
        each = self._params_of_each(params, len(prompts))
        work = [_Work(index, encode, own) for index, (encode, own) in enumerate(zip(prompts, each, strict=True))]
        try:
            return _Batch(self._text_engine, work, self._ids).run(progress)
        except BaseException:
            self._text_engine.abort_all()
            raise

    @staticmethod
    def _params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * num_prompts
        if len(params) != num_prompts:
            raise RequestError(f"{len(params)} params for {num_prompts} prompts; give one for each, or one for all", "params")
        return params


@dataclass(slots=True)
class _Line:
    """One output while it grows."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.last = delta

    def done(self) -> CompletionOutput:
        last = self.last
        assert last is not None
        assert last.finish_reason is not None
        return CompletionOutput(
            "".join(self.text),
            tuple(self.tokens),
            tuple(self.logprobs),
            last.finish_reason,
            last.stop_reason,
            last.cumulative_logprob,
            last.error,
        )


@dataclass(slots=True)
class _Work:
    """One prompt on its way."""

    index: int
    encode: Encode
    params: SamplingParams
    ids: tuple[int, ...] = ()
    lines: dict[int, _Line] = field(default_factory=dict)
    num_open: int = 0
    cached_tokens: int = 0

    def completion(self) -> Completion:
        outputs = tuple(self.lines[index].done() for index in sorted(self.lines))
        return Completion(self.index, self.ids, outputs, self.cached_tokens)


class _Batch:
    """The work of one call of `generate`."""

    def __init__(self, engine: TextEngine, work: list[_Work], ids: count[int]):
        self.engine = engine
        self.waiting = work[::-1]
        self.running: dict[str, _Work] = {}
        self.done: dict[int, Completion] = {}
        self.ids = ids
        self.num_tokens = 0

    def run(self, progress: bool) -> list[Completion]:
        from tqdm import tqdm

        start_s = time.perf_counter()
        with tqdm(total=len(self.waiting), disable=not progress, desc="generate", unit="prompt", dynamic_ncols=True) as bar:
            while self.waiting or self.running:
                num_before = len(self.done)
                self.admit()
                if self.running:
                    self.advance()
                bar.set_postfix_str(f"{self.num_tokens / (time.perf_counter() - start_s):.0f} tokens/s", refresh=False)
                bar.update(len(self.done) - num_before)
        return [self.done[index] for index in sorted(self.done)]

    def admit(self) -> None:
        """Hand waiting prompts to the engine until its queue is full."""
        while self.waiting:
            work = self.waiting[-1]
            request_id = f"offline-{next(self.ids)}"
            try:
                if not work.ids:
                    work.ids = tuple(work.encode())
                self.engine.add(Request(request_id, work.ids, work.params))
            except CapacityError as error:
                if self.running:
                    return  # room comes with the next steps
                self.refuse(work, error)
            except GemelError as error:
                self.refuse(work, error)
            else:
                work.num_open = work.params.n
                self.running[request_id] = work
            self.waiting.pop()

    def refuse(self, work: _Work, error: GemelError) -> None:
        outputs = tuple(CompletionOutput("", (), (), FinishReason.ERROR, error=str(error)) for _ in range(work.params.n))
        self.done[work.index] = Completion(work.index, work.ids, outputs)

    def advance(self) -> None:
        """One step of the engine."""
        for request_id, delta in self.engine.step():
            work = self.running[request_id]
            work.lines.setdefault(delta.index, _Line()).add(delta)
            work.cached_tokens = max(work.cached_tokens, delta.cached_tokens)
            work.num_open -= delta.finish_reason is not None
            self.num_tokens += len(delta.tokens)
            if work.num_open == 0:
                self.done[work.index] = self.running.pop(request_id).completion()

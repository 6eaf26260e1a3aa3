"""What the routes share: the model behind them, the limits, and the way from a body to prompt ids.

Tokenizing and rendering run in threads: a 2 MB prompt takes a good part of a second, and everyone else's tokens must flow meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import HTTPConnection, Request

from gemel.config.sampling import SamplingParams
from gemel.config.server import ServerConfig
from gemel.llm.online import AsyncLLM
from gemel.server.body import Json, read_json
from gemel.server.errors import ApiError
from gemel.server.metrics import Metrics
from gemel.server.protocol import Body, ChatBody, CompletionBody, Message, Prompt, Tool, parse_body, sampling_params

B = TypeVar("B", bound=Body)


@dataclass(frozen=True)
class Job:
    """One call, ready for the engine: prompts as token ids and how to continue each."""

    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    priority: int
    salt: str


@dataclass(frozen=True)
class Service:
    """One served model."""

    llm: AsyncLLM
    config: ServerConfig
    model_name: str
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    async def read(self, request: Request, cls: type[B]) -> B:
        """The request's body as a `cls`, for the model that is served."""
        value = await read_json(request, self.config.max_body_bytes, self.config.read_timeout_s)
        return await self.parse(cls, value)

    async def parse(self, cls: type[B], value: Json) -> B:
        """`value` as a `cls`, for the model that is served."""
        body = await asyncio.to_thread(parse_body, cls, value)
        self.check_model(getattr(body, "model", None))
        return body

    def check_model(self, name: str | None) -> None:
        """Raise 404 unless `name` is served here. No name means the one that is."""
        if name is not None and name != self.model_name:
            message = f"The model {name[:200]!r} does not exist here; the server has {self.model_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat_job(self, body: ChatBody) -> Job:
        """A chat completion, rendered by the model's template."""
        params = sampling_params(body)
        tools = body.tools if body.tool_choice == "auto" else None
        ids = await self.render(body.messages, tools, body.add_generation_prompt, body.continue_final_message)
        return self.job([ids], params, body, param="messages")

    async def completion_job(self, body: CompletionBody) -> Job:
        """A plain completion of one or more prompts."""
        params = sampling_params(body)
        prompts = body.prompts
        self._check_outputs(len(prompts), params)
        ids = await asyncio.to_thread(self._encode_all, prompts)
        return self.job(ids, params, body, param="prompt")

    async def render(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, add_generation_prompt: bool, continue_final: bool
    ) -> list[int]:
        """A conversation as prompt ids. Tools that the model's template does not show are refused: the model would not know of them."""
        if continue_final and messages[-1].role != "assistant":
            message = f"'continue_final_message' continues what the assistant said, but the last message is from {messages[-1].role!r}."
            raise ApiError(400, message, param="messages")
        turns = [message.for_template() for message in messages]
        shown = [tool.model_dump(exclude_none=True) for tool in tools or ()]

        def rendered(with_tools: bool) -> list[int]:
            opens = add_generation_prompt and not continue_final
            return self.llm.tokenizer.render_chat(turns, shown if with_tools else None, opens, continue_final)

        ids = await asyncio.to_thread(rendered, bool(shown))
        if shown and ids == await asyncio.to_thread(rendered, False):
            message = "the chat template of this model does not show tools to it; remove 'tools', or set 'tool_choice' to 'none'"
            raise ApiError(400, message, param="tools", code="unsupported_value")
        return ids

    def job(self, prompts: Sequence[Sequence[int]], params: SamplingParams, body: ChatBody | CompletionBody, param: str) -> Job:
        """Checked against the limits of model and server. `param` is where the caller put the prompt."""
        self._check_outputs(len(prompts), params)
        for ids in prompts:
            self.check_length(len(ids), params.max_tokens or params.min_tokens, param)
        return Job(tuple(tuple(ids) for ids in prompts), params, body.priority, body.cache_salt)

    def check_length(self, num_prompt: int, num_asked: int, param: str) -> None:
        """Raise 400 unless the prompt and what is asked for fit into the model's context."""
        limit = self.llm.engine.max_context
        if num_prompt == 0:
            raise ApiError(400, "The prompt is empty: it has no token to continue from.", param=param)
        if num_prompt >= limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, your prompt has {num_prompt} tokens. Please shorten it."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if num_prompt + num_asked > limit:
            message = (
                f"This model's maximum context length is {limit} tokens. However, you asked for {num_prompt + num_asked} tokens "
                f"({num_prompt} in the prompt, {num_asked} for the completion). Please shorten either."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """A token as text and as bytes. The bytes are exact; as text, a part of a character shows as U+FFFD."""
        spelt = self.llm.tokenizer.token_bytes(token)
        return spelt.decode("utf-8", "replace"), list(spelt) or None

    def _check_outputs(self, num_prompts: int, params: SamplingParams) -> None:
        each = max(params.n, params.beam_width or 1)
        if num_prompts * each > self.config.max_outputs:
            message = (
                f"{num_prompts} prompts times {each} outputs is {num_prompts * each}; the limit of one call is "
                f"{self.config.max_outputs}. Send several calls."
            )
            raise ApiError(400, message, param="prompt" if num_prompts > each else "n", code="too_many_outputs")

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [self.llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def service_of(connection: HTTPConnection) -> Service:
    """The service of the app that handles `connection`."""
    service = connection.app.state.service
    assert isinstance(service, Service)
    return service

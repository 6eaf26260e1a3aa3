"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from gemel.engine.request import TokenLogprob
from gemel.llm.online import Delta
from gemel.server.access import record_of
from gemel.server.generate import Choice, answer
from gemel.server.protocol import ChatBody
from gemel.server.service import Service, service_of


class ChatShape:
    """Answers as `chat.completion` and `chat.completion.chunk`."""

    def __init__(self, service: Service, request_id: str):
        self.service = service
        self.head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": service.model_name}

    def opening(self, index: int) -> list[dict[str, object]]:
        """The role comes before the first text."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self.head, "object": "chat.completion.chunk", "choices": [choice]}]

    def chunk(self, index: int, delta: Delta) -> dict[str, object]:
        """A piece of text; the last one says why it is the last."""
        choice: dict[str, object] = {"index": index, "delta": {"content": delta.text} if delta.text or delta.logprobs else {}}
        choice |= {"logprobs": self.logprobs(index, delta.logprobs) if delta.logprobs else None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, object]) -> dict[str, object]:
        """Counts only."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, object]) -> dict[str, object]:
        """All choices at once."""
        listed = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                "logprobs": self.logprobs(index, choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self.head, "object": "chat.completion", "choices": listed, "usage": usage}

    def logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:  # noqa: ARG002
        """Log-probabilities of a run of tokens, each with its likeliest rivals."""
        return {
            "content": [
                {**self._token(item.token, item.logprob), "top_logprobs": [self._token(token, logprob) for token, logprob in item.top]}
                for item in logprobs
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, object]:
        text, in_bytes = self.service.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": in_bytes}


async def chat_completions(request: Request) -> Response:
    """The route."""
    service = service_of(request)
    body = await service.read(request, ChatBody)
    job = await service.chat_job(body)
    return await answer(request, service, body, job, ChatShape(service, record_of(request.scope).id))

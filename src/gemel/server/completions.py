"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from gemel.engine.request import TokenLogprob
from gemel.llm.online import Delta
from gemel.server.access import record_of
from gemel.server.generate import Choice, answer
from gemel.server.protocol import CompletionBody
from gemel.server.service import Service, service_of


class CompletionShape:
    """Answers as `text_completion`."""

    def __init__(self, service: Service, request_id: str):
        self.service = service
        self.head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": service.model_name}
        self._offsets: dict[int, int] = {}  # characters of each choice whose log-probabilities were sent

    def opening(self, index: int) -> list[dict[str, object]]:  # noqa: ARG002
        """Nothing comes before the text."""
        return []

    def chunk(self, index: int, delta: Delta) -> dict[str, object]:
        """A piece of text; the last one says why it is the last."""
        choice: dict[str, object] = {"index": index, "text": delta.text}
        choice |= {"logprobs": self.logprobs(index, delta.logprobs) if delta.logprobs else None, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        return {**self.head, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, object]) -> dict[str, object]:
        """Counts only."""
        return {**self.head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, object]) -> dict[str, object]:
        """All choices at once: the n of the first prompt, then those of the second..."""
        listed = [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": self.logprobs(index, choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self.head, "choices": listed, "usage": usage}

    def logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, object]:
        """Log-probabilities in columns. Offsets count the characters of the tokens' texts, from the first token of the output."""
        texts = [self.service.token_text(item.token)[0] for item in logprobs]
        offsets, end = [], self._offsets.get(index, 0)
        for text in texts:
            offsets.append(end)
            end += len(text)
        self._offsets[index] = end
        return {
            "tokens": texts,
            "token_logprobs": [item.logprob for item in logprobs],
            "top_logprobs": [self._top(item) for item in logprobs],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        """By text, as OpenAI has it; of two tokens that show the same text the likelier one stays."""
        by_text: dict[str, float] = {}
        for token, logprob in item.top:
            by_text.setdefault(self.service.token_text(token)[0], logprob)
        return by_text


async def completions(request: Request) -> Response:
    """The route."""
    service = service_of(request)
    body = await service.read(request, CompletionBody)
    job = await service.completion_job(body)
    return await answer(request, service, body, job, CompletionShape(service, record_of(request.scope).id))
